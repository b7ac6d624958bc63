"""Normalisation over the last dimension: PyTorch's own modules, chosen by name."""

from torch import nn

EPS = 1e-5


def make_norm(kind: str, d_model: int) -> nn.Module:
    """ "rmsnorm" or "layernorm" of width d_model."""
    return nn.RMSNorm(d_model, EPS) if kind == "rmsnorm" else nn.LayerNorm(d_model, EPS)
