"""Attention in plain PyTorch: what it means."""

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """See `moemamba.ops.attention`. PyTorch's plain operations, which have every derivative; it adds its mask."""
    shared = q.shape[1] // k.shape[1]
    k, v = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (k, v))
    added = None if visible is None else q.new_zeros(()).masked_fill(~visible[:, None], -math.inf)
    return torch._scaled_dot_product_attention_math(q, k, v, added, 0.0, visible is None)[0]
