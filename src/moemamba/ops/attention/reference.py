"""Attention and rotary positions in plain PyTorch: what they mean."""

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """See `moemamba.ops.attention`. It has every derivative; it adds its mask."""
    shared = q.shape[1] // k.shape[1]
    k, v = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (k, v))
    added = None if visible is None else q.new_zeros(()).masked_fill(~visible[:, None], -math.inf)
    return torch._scaled_dot_product_attention_math(q, k, v, added, 0.0, visible is None)[0]


def rotary(x: Tensor, place: Tensor, base: float) -> Tensor:
    """See `moemamba.ops.rotary`."""
    angle = place[:, None, :, None] * frequencies(x.shape[-1], base, x.device)  # (b, 1, l, w/2)
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """(w/2,) float32 of each pair."""
    half = width // 2
    frequency: Tensor = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    return frequency
