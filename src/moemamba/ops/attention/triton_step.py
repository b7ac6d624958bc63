# mypy: ignore-errors
"""One decoded token's attention on a GPU, over keys and values that stay where they are (flash-decoding).

Each program has the queries that share a head of keys, and some of the row's keys: as many programs as fill the GPU.
A row's keys are shared out evenly by how many it has, which the device alone knows, so that a CUDA graph holds a step.
The program whose share ends with the new key turns and writes it. Few keys are one share, and one launch; otherwise a
second one adds up the shares. What bounds it is keys and values: 32,768 of 8 heads of width 64 are 67 MB of bfloat16 a
layer, 16 us at 4.2 TB/s. No gradients.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.triton import LOG2E, launch, multiprocessors, overlap, ready
from . import reference

SHARE = 512  # keys of a row up to which one program takes them all
PROGRAMS = 4  # on a multiprocessor, about
BLOCK = 64  # keys at once


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, place: Tensor, base: float | None
) -> Tensor:
    """See `moemamba.ops.attention_step`."""
    batch, (groups, room, width) = qkv.shape[0], keys.shape[1:]
    qkv, heads = qkv.contiguous(), qkv.shape[1] // width - 2 * groups
    shared, pdl = heads // groups, overlap(qkv)
    most = PROGRAMS * (multiprocessors(qkv.device) if qkv.is_cuda else 1)
    shares = max(1, min(triton.cdiv(room, SHARE), triton.cdiv(most, batch * groups), 256))
    frequency = None if base is None else _frequencies(width, base, qkv.device)
    y = qkv.new_empty(batch, heads * width)
    parts = tops = None
    if shares > 1:
        parts, tops = (qkv.new_empty(batch, heads, shares, size, dtype=torch.float32) for size in (width, 2))
    H, W = triton.next_power_of_2(shared), max(16, triton.next_power_of_2(width))
    H = max(16, H) if H > 1 else 1
    share_kernel[(shares, groups, batch)](
        qkv, keys, values, positions, place, frequency, y, parts, tops, groups, width, width**-0.5 * LOG2E.value,
        *keys.stride()[:3], *values.stride()[:3], positions.stride(0),
        SHARED=shared, H=H, W=W, BLOCK=BLOCK, **launch(4, pdl),
    )  # fmt: skip
    if shares > 1:
        sum_kernel[(heads, batch)](
            parts, tops, y, shares, width, T=triton.next_power_of_2(shares), W=W, **launch(4, pdl)
        )
    return y


@cache
def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    return reference.frequencies(width, base, device)


@triton.jit
def _turned(x, place, column, width, frequency, position):
    """Entries x + place (N, W) of vectors of some width, turned by their position, in float32."""
    inside = (column < width)[None, :]
    v = tl.load(x + place[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if frequency is not None:
        half = width // 2
        other = tl.where(column < half, column + half, column - half)
        u = tl.load(x + place[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
        f = tl.load(frequency + tl.minimum(column, other), mask=column < width, other=0.0)
        angle = position.to(tl.float32) * f
        sin = tl.where(column < half, -tl.sin(angle), tl.sin(angle))
        v = (v * tl.cos(angle)[None, :] + u * sin[None, :]).to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def share_kernel(
    qkv, keys, values, positions, place, frequency, y, parts, tops, groups, width, scale,
    k_row, k_head, k_step, v_row, v_head, v_step, p_row,
    SHARED: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries of one head of keys over a share of the row's keys: what comes out, or its part of that."""
    share, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    shares = tl.num_programs(0)
    head, column = tl.arange(0, H), tl.arange(0, W)
    ready(PDL)
    count = tl.load(place + row)  # earlier entries
    position = tl.full((), -1, tl.int64)
    end = count
    while (end > 0) & (position < 0):  # that of the last entry that is of the row's sequence: as a rule the last one
        entry = end - BLOCK + tl.arange(0, BLOCK)
        position = tl.max(tl.load(positions + row * p_row + entry, mask=(entry >= 0) & (entry < count), other=-1), 0)
        end -= BLOCK
    position += 1
    heads = groups * SHARED
    own = qkv + row * (heads + 2 * groups) * width
    at = (group * SHARED + tl.minimum(head, SHARED - 1)) * width
    q = _turned(own, at, column, width, frequency, position)
    k_base, v_base = keys + row * k_row + group * k_head, values + row * v_row + group * v_head
    span = tl.cdiv(tl.cdiv(count + 1, shares), BLOCK) * BLOCK
    first, last = share * span, tl.minimum((share + 1) * span, count + 1)
    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    acc = tl.zeros((H, W), tl.float32)
    if (first <= count) & (count < last):  # the new key is the last of this share
        one = tl.arange(0, 1)
        new = _turned(own, (heads + group + one) * width, column, width, frequency, position)
        value = _turned(own, (heads + groups + group + one) * width, column, width, None, position)
        inside_new = (column < width)[None, :]
        tl.store(k_base + count * k_step + one[:, None] + column[None, :], new, mask=inside_new)
        tl.store(v_base + count * v_step + one[:, None] + column[None, :], value, mask=inside_new)
        if group == 0:
            tl.store(positions + row * p_row + count, position)
        top = tl.sum(q * new, 1) * scale
        total += tl.exp2(top - top)  # one, or not a number
        acc += value
    for start in range(first, tl.minimum(last, count), BLOCK):
        entry = start + tl.arange(0, BLOCK)
        seen = entry < tl.minimum(last, count)
        seen = seen & (tl.load(positions + row * p_row + entry, mask=seen, other=-1) >= 0)
        inside = seen[:, None] & (column < width)[None, :]
        k = tl.load(k_base + entry.to(tl.int64)[:, None] * k_step + column[None, :], mask=inside, other=0.0)
        v = tl.load(v_base + entry.to(tl.int64)[:, None] * v_step + column[None, :], mask=inside, other=0.0)
        if H > 1:
            scores = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="tf32x3")
        else:
            scores = tl.sum(q * k.to(tl.float32), 1)[None, :]
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weight, 1)
        if H > 1:
            acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
        else:
            acc = acc * shrink[:, None] + tl.sum(tl.trans(weight) * v.to(tl.float32), 0)[None, :]
        top = above
    real = (head < SHARED)[:, None] & (column < width)[None, :]
    head = group * SHARED + head
    if parts is None:
        out = y + (row * heads + head[:, None]) * width + column[None, :]
        tl.store(out, acc / total[:, None], mask=real)
    else:
        where = (row * heads + head) * shares + share
        tl.store(parts + where[:, None] * width + column[None, :], acc, mask=real)
        mine = tl.arange(0, H) < SHARED
        tl.store(tops + where * 2, top, mask=mine)
        tl.store(tops + where * 2 + 1, total, mask=mine)


@triton.jit
def sum_kernel(parts, tops, y, shares, width, T: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr):
    """One head of one row: the shares, added up."""
    where = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    share, column = tl.arange(0, T), tl.arange(0, W)
    ready(PDL)
    top = tl.load(tops + (where * shares + share) * 2, mask=share < shares, other=float("-inf"))
    total = tl.load(tops + (where * shares + share) * 2 + 1, mask=share < shares, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))  # the new key is in one of them, so the highest is a number, if all are
    inside = (share < shares)[:, None] & (column < width)[None, :]
    part = parts + (where * shares + share)[:, None] * width + column[None, :]
    acc = tl.sum(tl.load(part, mask=inside, other=0.0) * weight[:, None], 0)
    tl.store(y + where * width + column, acc / tl.sum(total * weight, 0), mask=column < width)
