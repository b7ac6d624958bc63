"""The public op of attention; see `moemamba.ops`. PyTorch's own kernels compute it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choice import forced, transformed


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(w)) v`.

    Args:
        q: (b, h, l, w).
        k, v: (b, h, s, w).
        visible: (b, l, s) bool, the keys that each query sees, one at least; None: those up to its own place (l = s).
    Returns:
        (b, h, l, w).
    """
    mask, causal = (None, True) if visible is None else (visible[:, None], False)
    if forced() == "reference" or transformed(q, k, v):  # plain PyTorch, which has every derivative
        return torch._scaled_dot_product_attention_math(q, k, v, mask, 0.0, causal)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
