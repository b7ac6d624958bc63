"""Attention and its rotary positions."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..arguments import expect, sizes
from ..choice import Door, choose, compute, declare, forced
from ..derivatives import transformed
from . import reference


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(w)) v`. With gradients, and on GPUs, PyTorch's own kernels compute it.

    Args:
        q: (b, h, l, w).
        k, v: (b, g, s, w), each of the g heads for h / g neighbouring ones of q (arXiv 2305.13245).
        visible: (b, l, s) bool, the keys that each query sees, one at least; None: those up to its own place (l = s).
    Returns:
        (b, h, l, w).
    """
    batch, heads, _, width = sizes("q", q, "b, h, l, w")
    groups, keys = sizes("k", k, "b, g, s, w")[1:3]
    expect("k", k, (batch, groups, keys, width))
    expect("v", v, (batch, groups, keys, width))
    if heads % groups:
        raise ValueError(f"k has {groups} heads, and q {heads}; each must be shared by equally many")
    if forced() == "reference" or transformed(q, k, v) or choose("attention", q, k, v) == "cpu":
        return compute("attention", q, k, v, visible)  # type: ignore[no-any-return]
    mask = None if visible is None else visible[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None, enable_gqa=groups < heads)


def rotary(x: Tensor, place: Tensor, base: float) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): the pairs (x_j, x_{j + w/2}) turned by place times base^(-2j/w), in float32.

    Args:
        x: (b, h, l, w), w even.
        place: (b, l) int64.
        base: of the frequencies.
    Returns:
        (b, h, l, w) in x's dtype.
    """
    batch, _, length, _ = sizes("x", x, "b, h, l, w")
    expect("place", place, (batch, length))
    return compute("rotary", x, place, base)  # type: ignore[no-any-return]


def _attention_cpu() -> Callable[..., Any]:
    from .cpu import attention

    return attention


def _rotary_cpu() -> Callable[..., Any]:
    from .cpu import rotary

    return rotary


declare("attention", reference.attention, cpu=Door(_attention_cpu, holds="no gradient"))
declare("rotary", reference.rotary, cpu=Door(_rotary_cpu, holds="no gradient"))
