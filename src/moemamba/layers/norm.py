"""Normalisation over the last dimension, chosen by name."""

from torch import Tensor, nn

from .. import ops

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean x^2 + eps) * weight` (arXiv 1910.07467): PyTorch's module over `ops.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> the same."""
        assert self.weight is not None
        assert self.eps is not None
        return ops.rms_norm(x, self.weight, self.eps)


def make_norm(kind: str, d_model: int) -> nn.Module:
    """ "rmsnorm" or "layernorm" of width d_model."""
    return RMSNorm(d_model, EPS) if kind == "rmsnorm" else nn.LayerNorm(d_model, EPS)
