"""Attention and rotary positions in plain PyTorch: what they mean."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """See `moemamba.ops.attention`. It has every derivative; it adds its mask."""
    shared, visible = q.shape[1] // k.shape[1], causal(q, k) if visible is None else visible
    k, v = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (k, v))
    added = None if visible is None else q.new_zeros(()).masked_fill(~visible[:, None], -math.inf)
    return torch._scaled_dot_product_attention_math(q, k, v, added, 0.0, visible is None)[0]


def causal(q: Tensor, k: Tensor) -> Tensor | None:
    """(1, l, s): the keys up to each query's own place, where there are earlier ones than those of the queries."""
    length, keys = q.shape[2], k.shape[2]
    if length == keys:
        return None
    return torch.ones(1, length, keys, dtype=torch.bool, device=q.device).tril(keys - length)


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


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, place: Tensor, base: float | None
) -> Tensor:
    """See `moemamba.ops.attention_step`."""
    return step_by(attention, rotary, qkv, keys, values, positions, place, base)


def step_by(
    attend: Callable[..., Tensor],
    rotate: Callable[..., Tensor],
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    place: Tensor,
    base: float | None,
) -> Tensor:
    """`attention_step` by such an `attention` and `rotary`."""
    groups, width = keys.shape[1], keys.shape[3]
    heads, rows = qkv.shape[1] // width - 2 * groups, torch.arange(qkv.shape[0], device=qkv.device)
    q, k, v = qkv.unflatten(1, (-1, width))[:, :, None].split((heads, groups, groups), 1)
    position = positions.amax(1) + 1
    if base is not None:
        q, k = (rotate(x, position[:, None], base) for x in (q, k))
    keys[rows, :, place], values[rows, :, place] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
    positions[rows, place] = position
    y = attend(q, keys.to(q.dtype), values.to(q.dtype), (positions >= 0)[:, None])
    return y.flatten(1)
