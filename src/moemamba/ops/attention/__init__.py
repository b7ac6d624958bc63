"""The public op of attention; see `moemamba.ops`. PyTorch's own kernels compute it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choice import forced
from ..derivatives import transformed


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(w)) v`.

    Args:
        q: (b, h, l, w).
        k, v: (b, h, s, w).
        visible: (b, l, s) bool, the keys that each query sees, one at least; None: those up to its own place (l = s).
    Returns:
        (b, h, l, w).
    """
    if not (forced() == "reference" or transformed(q, k, v)):
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None)
    # Plain PyTorch, which has every derivative; it adds its mask.
    added = None if visible is None else q.new_zeros(()).masked_fill(~visible[:, None], -math.inf)
    return torch._scaled_dot_product_attention_math(q, k, v, added, 0.0, visible is None)[0]
