"""The public op of attention; see `moemamba.ops`. PyTorch's own kernels compute it."""

import torch.nn.functional as F
from torch import Tensor

from ..arguments import expect, sizes
from ..choice import forced
from ..derivatives import transformed
from . import reference


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(w)) v`.

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
    if forced() == "reference" or transformed(q, k, v):
        return reference.attention(q, k, v, visible)
    mask = None if visible is None else visible[:, None]
    fewer = groups < heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None, enable_gqa=fewer)
