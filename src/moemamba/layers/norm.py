"""Normalisation over the last dimension, chosen by name."""

from collections.abc import Callable

from torch import Tensor, nn

from .. import ops
from .plain import plain

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean x^2 + eps) * weight` (arXiv 1910.07467): PyTorch's module over `ops.rms_norm`."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> the same."""
        assert self.weight is not None
        assert self.eps is not None
        return ops.rms_norm(x, self.weight, self.eps)


def make_norm(kind: str, d_model: int) -> nn.Module:
    """ "rmsnorm" or "layernorm" of width d_model."""
    return RMSNorm(d_model, EPS) if kind == "rmsnorm" else nn.LayerNorm(d_model, EPS)


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
