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
        visible: (b, l, s) bool, the keys that each query sees, one at least; None: those up to its own place, which
            for the last query is that of the last key.
    Returns:
        (b, h, l, w).
    """
    batch, heads, length, width = sizes("q", q, "b, h, l, w")
    groups, keys = sizes("k", k, "b, g, s, w")[1:3]
    expect("k", k, (batch, groups, keys, width))
    expect("v", v, (batch, groups, keys, width))
    if heads % groups:
        raise ValueError(f"k has {groups} heads, and q {heads}; each must be shared by equally many")
    if visible is None and length > keys:
        raise ValueError(f"k has {keys} positions and q {length}; without `visible` a query sees the key of its place")
    if forced() == "reference" or transformed(q, k, v) or choose("attention", q, k, v) == "cpu":
        return compute("attention", q, k, v, visible)  # type: ignore[no-any-return]
    visible = reference.causal(q, k) if visible is None else visible
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


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, place: Tensor, base: float | None
) -> Tensor:
    """One position of causal self-attention over buffers of keys and values, which are extended in place. No gradients.

    Args:
        qkv: (b, (h + 2g) w) queries, keys and values of the new position, not yet turned.
        keys, values: (b, g, s, w), with room for the new ones; entries behind those may be anything that is finite.
        positions: (b, s) int64 of each entry in the row's sequence; negative for entries that are not of it.
        place: (b,) int64 where the new entry goes, behind all others.
        base: of rotary positions; None where there are none.
    Returns:
        (b, h w); keys, values and positions have the new entry.
    """
    batch, features = sizes("qkv", qkv, "b, h w")
    groups, room, width = sizes("keys", keys, "b, g, s, w")[1:]
    expect("keys", keys, (batch, groups, room, width))
    expect("values", values, (batch, groups, room, width))
    expect("positions", positions, (batch, room))
    expect("place", place, (batch,))
    heads = features // width - 2 * groups
    if features % width or heads < 1 or heads % groups:
        raise ValueError(f"qkv has {features} features; with {groups} heads of keys of width {width} that is no layer")
    return compute("attention_step", qkv, keys, values, positions, place, base)  # type: ignore[no-any-return]


def _step_supports(qkv: Tensor, *others: Any) -> str | None:
    if not others:
        return None
    keys, values, positions = others[:3]
    if not keys.dtype == values.dtype == qkv.dtype:
        return f"its keys are of {keys.dtype}, and what is new of {qkv.dtype}"
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or positions.stride(-1) != 1:
        return "its keys, values or positions do not lie side by side"
    return "it has kernels for heads of a width up to 256" if keys.shape[-1] > 256 else None


def _attention_cpu() -> Callable[..., Any]:
    from .cpu import attention

    return attention


def _step_cpu() -> Callable[..., Any]:
    from .cpu import attention_step

    return attention_step


def _step_triton() -> Callable[..., Any]:
    from .triton_step import attention_step

    return attention_step


def _rotary_cpu() -> Callable[..., Any]:
    from .cpu import rotary

    return rotary


declare("attention", reference.attention, cpu=Door(_attention_cpu, holds="no gradient"))
declare("rotary", reference.rotary, cpu=Door(_rotary_cpu, holds="no gradient"))
declare(
    "attention_step",
    reference.attention_step,
    cpu=Door(_step_cpu, holds="no gradient"),
    triton=Door(_step_triton, holds="no gradient", supports=_step_supports, asked=True),
)
