"""Normalisation over the last dimension, chosen by name."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .. import ops
from .plain import plain

if TYPE_CHECKING:
    from ..config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean x^2 + eps) * weight` (arXiv 1910.07467): PyTorch's module over `ops.rms_norm`.

    With `elementwise_affine=False` there is no weight.
    """

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> the same."""
        assert self.eps is not None
        return ops.rms_norm(x, self.weight, self.eps)


def make_norm(kind: str, d_model: int, eps: float = 1e-5) -> nn.Module:
    """ "rmsnorm" or "layernorm" of width d_model."""
    return RMSNorm(d_model, eps) if kind == "rmsnorm" else nn.LayerNorm(d_model, eps)


def final_norm(config: "ModelConfig") -> nn.Module:
    """The norm before the head of a model; nothing where it has none."""
    if not config.final_norm:
        return nn.Identity()
    return make_norm(config.final_norm_kind or config.norm, config.d_model, config.norm_eps)


def prepare_norm(norm: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """A function of how many rows of x (rows, d), whose norm it writes to y (rows, d), over and over; see
    `Layer.prepare`."""
    step = None
    if plain(norm, RMSNorm) and norm.weight is not None:
        step = ops.prepare_rms_norm(x, norm.weight, norm.eps, y)  # type: ignore[arg-type]

    def call(live: int) -> None:
        y[:live].copy_(norm(x[:live]))

    return step or call


def norm_alone(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and epsilon of a norm that a kernel of a whole sub-layer may compute; None for any other."""
    if plain(norm, RMSNorm):
        weight, bias, eps = norm.weight, None, norm.eps
    elif plain(norm, nn.LayerNorm):
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        if bias is None:
            return None
    else:
        return None
    return None if weight is None or weight.dtype != x.dtype else (weight, bias, eps)  # type: ignore[return-value]
