"""M: the selective state-space layer."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..marks import documented, later
from ..reading import validate
from .letter import Letter
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig


@documented
@dataclass(frozen=True)
class MambaConfig(Options):
    """The selective state-space layer, letter `M` (arXiv 2312.00752, section 3.4)."""

    d_state: int = 16
    """state dimensions of each channel, n"""
    d_conv: int = 4
    """taps of the causal convolution, k: how many tokens it sees"""
    expand: float = 2.0
    """width inside the layer as a multiple of d_model: d_inner = int(expand * d_model)"""
    dt_rank: int | None = None
    """rank of the step-size projection, r; ceil(d_model / 16) if None"""
    inner_norm: Literal["none", "rmsnorm", "weightless"] = later("none")
    """root-mean-square norms of dt (before its projection), B and C: with weights (Jamba, arXiv 2403.19887) or without
    (Falcon-Mamba, arXiv 2410.05355)"""
    inner_norm_eps: float | None = later(None)
    """added to the mean square in them; norm_eps if None"""
    conv_bias: bool = later(True)
    """a bias of the convolution"""
    proj_bias: bool = later(False)
    """biases of the projections in and out"""

    def __post_init__(self) -> None:
        validate(self, positive=("d_state", "d_conv", "expand", "dt_rank", "inner_norm_eps"))
        if self.inner_norm == "none" and self.inner_norm_eps is not None:
            raise ValueError(
                f"inner_norm_eps is {self.inner_norm_eps}, but inner_norm is 'none'; "
                "choose an inner norm, or set inner_norm_eps to None"
            )

    def inner(self, d_model: int) -> int:
        return int(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        return self.dt_rank or math.ceil(d_model / 16)


class Mamba(Letter):
    name = "Mamba"
    parts: tuple[str, ...] = ("mamba",)

    def check(self, config: "ModelConfig") -> None:
        if config.d_inner < 1:
            raise ValueError(
                f"expand is {config.mamba.expand}, of which d_model = {config.d_model} leaves no channel; "
                f"choose {1 / config.d_model:g} or more"
            )

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        biases = config.mamba.proj_bias * (2 * config.d_inner + config.d_model)
        return (self.core(config) + 3 * config.d_model * config.d_inner + biases,) * 2

    def core(self, config: "ModelConfig") -> int:
        """Parameters but for the projections in and out: conv1d, x_proj, inner norms, dt_proj, A_log, D."""
        i, n, r, options = config.d_inner, config.mamba.d_state, config.dt_rank, config.mamba
        norms = r + 2 * n if options.inner_norm == "rmsnorm" else 0
        return i * (options.d_conv + options.conv_bias) + norms + i * (r + 2 * n) + (r + 1) * i + i * n + i

    def flops(self, config: "ModelConfig", context: int) -> int:
        """The scan: decay, drive, update and output of each state dimension of each channel."""
        return 9 * config.d_inner * config.mamba.d_state

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        """The scan's state is float32."""
        return config.d_inner * (4 * config.mamba.d_state + element * (config.mamba.d_conv - 1))

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"mamba.dt_rank": config.dt_rank}

    def describe(self, config: "ModelConfig") -> str:
        norms = {"none": "", "rmsnorm": ", inner norms", "weightless": ", inner norms without weights"}
        return (
            f"Mamba: d_inner {config.d_inner}, d_state {config.mamba.d_state}, dt_rank {config.dt_rank}"
            f"{norms[config.mamba.inner_norm]}"
        )
