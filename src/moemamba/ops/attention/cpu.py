"""Attention on the CPU without gradients: what a query gets is a function of itself and of the keys that it sees, in
order.

Those are taken 64 at a time, beginning with the first that it sees, with a running maximum; so a query has the same
bits whatever is in its batch, however its prompt was cut, and wherever its keys lie. Four queries that see keys from
the same one on are taken together.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import dense_rows
from ..kit.cpu import LOG2E, bytes_at, clear, exact, exact_kernel, exp2, floats, fma, integers, located, new, run
from ..kit.cpu.lanes import LANES, weighing
from ..kit.cpu.product import MULTIPLICATIONS, product
from ..kit.op import traced
from . import reference

BLOCK, QUERIES = 64, 4
TASK = 32  # queries of a head that are a task

_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)
_weigh_four, _weigh_one = weighing(QUERIES), weighing(1)

Strides = tuple[int, int, int]
"""bytes from row to row of a batch, from head to head, from position to position"""


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """See `moemamba.ops.attention`."""
    y = None
    if not traced(q, k, v) and not torch.is_autocast_enabled("cpu"):
        y = _attend(dense_rows(q), dense_rows(k), dense_rows(v), visible)
    if y is not None:
        return y
    visible = reference.causal(q, k) if visible is None else visible
    mask = None if visible is None else visible[:, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=visible is None, enable_gqa=k.shape[1] < q.shape[1]
    )


def rotary(x: Tensor, place: Tensor, base: float) -> Tensor:
    """See `moemamba.ops.rotary`."""
    if traced(x) or x.stride(-1) != 1 or x.dtype != torch.float32 or place.dtype != torch.int64:
        return reference.rotary(x, place, base)
    (batch, heads, length, width), y = x.shape, new(*x.shape)
    frequency = reference.frequencies(width, base, x.device)
    places = located(x[..., :0], frequency, y)
    if places is None:
        return reference.rotary(x, place, base)
    place = place.contiguous()
    _, turns, out = places
    run(
        _rotate,
        batch * length,
        x.numel() // MULTIPLICATIONS,
        heads,
        length,
        width,
        x.data_ptr(),
        _strides(x),
        place.data_ptr(),
        turns,
        out,
    )
    return y


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, place: Tensor, base: float | None
) -> Tensor:
    """See `moemamba.ops.attention_step`."""
    return reference.step_by(attention, rotary, qkv, keys, values, positions, place, base)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor | None:
    """By the kernel; None where it cannot read what it is given."""
    (batch, heads, length, width), keys = q.shape, k.shape[2]
    y = new(*q.shape)
    if located(*(t[..., :0] for t in (q, k, v)), y) is None or (visible is not None and visible.dtype != torch.bool):
        return None
    marks, spans = None, new(batch, length, 2, dtype=torch.int64)
    if visible is not None:
        marks = visible.expand(batch, length, keys).contiguous()
    seen = 0 if marks is None else marks.data_ptr()
    work = batch * length * keys if seen else 0
    run(_spans, batch * length, work, length, keys, seen, spans.data_ptr())
    tasks = batch * heads * -(-length // TASK)
    run(
        _attention,
        tasks,
        q.numel() * keys // MULTIPLICATIONS,
        heads,
        heads // k.shape[1],
        length,
        keys,
        width,
        float(width**-0.5),
        *(t.data_ptr() for t in (q, k, v)),
        *(_strides(t) for t in (q, k, v)),
        seen,
        spans.data_ptr(),
        y.data_ptr(),
    )
    return y


def _strides(x: Tensor) -> Strides:
    batch, head, time, _ = x.stride()
    return 4 * batch, 4 * head, 4 * time


@exact_kernel
def _rotate(
    first: int,
    last: int,
    heads: int,
    length: int,
    width: int,
    x: int,
    strides: Strides,
    place: int,
    frequency: int,
    y: int,
) -> None:
    """Positions first .. last - 1 of all rows, one after the other."""
    half = width // 2
    places, turns = integers(place, (last,)), floats(frequency, (half,))
    cos, sin = np.empty(half, np.float32), np.empty(half, np.float32)
    for position in range(first, last):
        b, t = position // length, position % length
        for j in range(half):
            angle = np.float32(places[position]) * turns[j]
            cos[j], sin[j] = np.cos(angle), np.sin(angle)
        for h in range(heads):
            source = floats(x + b * strides[0] + h * strides[1] + t * strides[2], (width,))
            target = floats(y + 4 * width * ((b * heads + h) * length + t), (width,))
            for j in range(half):
                target[j] = fma(source[j], cos[j], -(source[half + j] * sin[j]))
                target[half + j] = fma(source[half + j], cos[j], source[j] * sin[j])


@exact_kernel
def _spans(first: int, last: int, length: int, keys: int, visible: int, spans: int) -> None:
    """(b l, 2): the first key that a query sees, and how many; as a negative number where some between are not seen."""
    span = integers(spans, (last, 2))
    for position in range(first, last):
        end = keys - length + position % length
        begin, count = 0, end + 1
        if visible:
            mark = bytes_at(visible + position * keys, (keys,))
            begin, count, end = keys, 0, -1
            for s in range(keys):
                if mark[s]:
                    begin, count, end = min(begin, s), count + 1, s
        span[position, 0], span[position, 1] = begin, count if end - begin + 1 == count else -count


@exact
def _soften(scores: Any, count: int, scale: Any, top: Any, total: Any) -> Any:
    """Scores of up to 64 keys become their weights beside `top`, the largest so far, which is updated like `total`, the
    weights' sums by lane. By how much earlier weights shrink."""
    largest = top
    for j in range(count):
        scores[j] *= scale
        largest = scores[j] if scores[j] > largest else largest
    for j in range(count, BLOCK):
        scores[j] = _LOWEST
    shrink = exp2(LOG2E * (top - largest)) if top > _LOWEST else _ZERO
    for j in range(BLOCK):
        scores[j] = exp2(LOG2E * (scores[j] - largest))
    for j in range(count, BLOCK):
        scores[j] = _ZERO
    for lane in range(LANES):
        total[lane] *= shrink
    for j in range(0, BLOCK, LANES):
        for lane in range(LANES):
            total[lane] += scores[j + lane]
    return largest, shrink


@exact
def _add_values(rows: int, count: int, scores: int, v: int, v_step: int, acc: int, width: int) -> None:
    """acc (rows, w) += scores (rows, 64) v for `count` values; every number by itself, in order."""
    whole = width // LANES * LANES
    for c in range(0, whole, LANES):
        if rows == QUERIES:
            _weigh_four(count, scores, 4 * BLOCK, v + 4 * c, v_step, acc + 4 * c, 4 * width)
        else:
            for r in range(rows):
                _weigh_one(count, scores + 4 * BLOCK * r, 0, v + 4 * c, v_step, acc + 4 * (r * width + c), 0)
    for r in range(rows):
        share, target = floats(scores + 4 * BLOCK * r, (BLOCK,)), floats(acc + 4 * r * width, (width,))
        for j in range(count if whole < width else 0):
            value = floats(v + j * v_step, (width,))
            for c in range(whole, width):
                target[c] = fma(share[j], value[c], target[c])


@exact
def _queries(
    rows: int,
    counts: Any,
    q: int,
    q_step: int,
    k: int,
    k_step: int,
    v: int,
    v_step: int,
    width: int,
    scale: Any,
    acc: Any,
) -> None:
    """acc (rows, w) becomes what so many queries get, of which query r sees the first counts[r] keys, ever more."""
    scores, totals = np.empty((QUERIES, BLOCK), np.float32), np.zeros((QUERIES, LANES), np.float32)
    tops = np.full(QUERIES, _LOWEST, np.float32)
    clear(acc, 0, acc.shape[0])
    base, where = acc.ctypes.data, scores.ctypes.data
    for start in range(0, counts[rows - 1], BLOCK):
        here = min(BLOCK, counts[rows - 1] - start)
        product(0, here, rows, width, q, q_step, k + start * k_step, k_step, where, 4 * BLOCK, 0, 0)
        together = True
        for r in range(rows):
            count = min(max(counts[r] - start, 0), BLOCK)
            together = together and count == here
            if count:
                tops[r], shrink = _soften(scores[r], count, scale, tops[r], totals[r])
                for c in range(width):
                    acc[r, c] *= shrink
        if together:
            _add_values(rows, here, where, v + start * v_step, v_step, base, width)
        else:
            for r in range(rows):
                count = min(counts[r] - start, BLOCK)
                if count > 0:
                    place = v + start * v_step
                    _add_values(1, count, where + 4 * BLOCK * r, place, v_step, base + 4 * width * r, width)
    for r in range(rows):
        total = totals[r]
        for apart in (8, 4, 2, 1):
            for lane in range(apart):
                total[lane] += total[lane + apart]
        for c in range(width):
            acc[r, c] /= total[0]


@exact_kernel
def _attention(
    first: int,
    last: int,
    heads: int,
    shared: int,
    length: int,
    keys: int,
    width: int,
    scale: float,
    q: int,
    k: int,
    v: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    visible: int,
    spans: int,
    y: int,
) -> None:
    """Tasks are TASK queries of one head; `shared` of them have one of the keys."""
    parts = (length + TASK - 1) // TASK
    factor = np.float32(scale)
    acc, counts = np.empty((QUERIES, width), np.float32), np.empty(QUERIES, np.int64)
    span = integers(spans, (last // (heads * parts) + 1, length, 2))
    # Beside the loop, for in it numba would free them after their last use that it sees: it does not see addresses.
    own_k, own_v = np.empty((keys, width), np.float32), np.empty((keys, width), np.float32)
    for task in range(first, last):
        row, part = task // parts, task % parts
        b, h = row // heads, row % heads
        q_base = q + b * q_strides[0] + h * q_strides[1]
        k_base = k + b * k_strides[0] + h // shared * k_strides[1]
        v_base = v + b * v_strides[0] + h // shared * v_strides[1]
        t, end = part * TASK, min(length, (part + 1) * TASK)
        while t < end:
            begin, apart, rows = span[b, t, 0], span[b, t, 1] < 0, 1
            counts[0] = abs(span[b, t, 1])
            while rows < QUERIES and t + rows < end and not apart:  # as many as see a run of keys from the same one on
                count = span[b, t + rows, 1]
                if span[b, t + rows, 0] != begin or count < counts[rows - 1]:
                    break
                counts[rows] = count
                rows += 1
            k_here, k_step, v_here, v_step = k_base + begin * k_strides[2], k_strides[2], v_base, v_strides[2]
            v_here += begin * v_strides[2]
            if apart:  # one query, whose keys are brought together
                mark, j = bytes_at(visible + (b * length + t) * keys, (keys,)), 0
                for s in range(begin, keys):
                    if mark[s]:
                        source_k = floats(k_base + s * k_strides[2], (width,))
                        source_v = floats(v_base + s * v_strides[2], (width,))
                        for c in range(width):
                            own_k[j, c], own_v[j, c] = source_k[c], source_v[c]
                        j += 1
                k_here, k_step, v_here, v_step = own_k.ctypes.data, 4 * width, own_v.ctypes.data, 4 * width
            here = acc[:rows]
            q_here = q_base + t * q_strides[2]
            _queries(rows, counts, q_here, q_strides[2], k_here, k_step, v_here, v_step, width, factor, here)
            for r in range(rows):
                target = floats(y + 4 * width * (row * length + t + r), (width,))
                for c in range(width):
                    target[c] = here[r, c]
            t += rows
