"""M: the selective state-space layer."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..marks import documented
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

    def __post_init__(self) -> None:
        validate(self, positive=("d_state", "d_conv", "expand", "dt_rank"))

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
        return (self.core(config) + 3 * config.d_model * config.d_inner,) * 2

    def core(self, config: "ModelConfig") -> int:
        """Parameters but for the projections in and out: conv1d, x_proj, dt_proj, A_log, D."""
        i, n, r = config.d_inner, config.mamba.d_state, config.dt_rank
        return i * (config.mamba.d_conv + 1) + i * (r + 2 * n) + (r + 1) * i + i * n + i

    def flops(self, config: "ModelConfig", context: int) -> int:
        """The scan: decay, drive, update and output of each state dimension of each channel."""
        return 9 * config.d_inner * config.mamba.d_state

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        """The scan's state is float32."""
        return config.d_inner * (4 * config.mamba.d_state + element * (config.mamba.d_conv - 1))

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"mamba.dt_rank": config.dt_rank}

    def describe(self, config: "ModelConfig") -> str:
        return f"Mamba: d_inner {config.d_inner}, d_state {config.mamba.d_state}, dt_rank {config.dt_rank}"
