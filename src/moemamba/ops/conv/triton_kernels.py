# mypy: ignore-errors
"""Triton kernels of the causal depthwise convolution over whole rows; those of packed rows: `triton_packed.py`.

A program owns S runs of T positions and a tile of I channels, a warp to each run. A run is walked position by position
with its window in registers, so that every row of x is read once, and the loads of K positions are issued together.
Beside its own positions a run reads the k - 1 before it, and in the backward pass the k - 1 after it, whose gradients
reach back into it.
"""

import triton
import triton.language as tl

from ..kit.triton import sigmoid, wide_index


@triton.jit
def _place(length, width, S: tl.constexpr, T: tl.constexpr, I: tl.constexpr):
    """Row of the batch; part of it; first position of each run (S, 1); channels (1, I); whether these exist."""
    tiles = tl.cdiv(width, I)
    parts = tl.maximum(tl.cdiv(length, S * T), 1)
    channel = tl.program_id(0) % tiles * I + tl.arange(0, I)
    part = tl.program_id(0) // tiles
    start = (part % parts * S + tl.arange(0, S)) * T
    return wide_index(part // parts), wide_index(part), start[:, None], channel[None, :], (channel < width)[None, :]


@triton.jit
def _taps(weight, channel, inside, TAPS: tl.constexpr, WIDE: tl.constexpr):
    """Columns of weight (i, k) as rows (1, I), the current position's first; a channel's taps are read at once."""
    tap = tl.arange(0, WIDE)[None, :]
    mask = tl.trans(inside) & (tap < TAPS)
    matrix = tl.load(weight + tl.trans(channel) * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
    columns = ()
    for back in tl.static_range(TAPS):
        columns = columns + (tl.sum(tl.where(tap == TAPS - 1 - back, matrix, 0.0), 1)[None, :],)
    return columns


@triton.jit
def _row(x, x_t, t, length, history, channel, inside, HISTORY: tl.constexpr):
    """Position t of x (pointers to position 0), or of the history before it, in float32; zeros where neither is."""
    row = tl.load(x + wide_index(t) * x_t, mask=inside & (t >= 0) & (t < length), other=0.0).to(tl.float32)
    if history is not None:
        early = inside & (t < 0) & (t >= -HISTORY)
        row += tl.load(history + channel * HISTORY + t + HISTORY, mask=early, other=0.0).to(tl.float32)
    return row


@triton.jit
def forward_kernel(
    x, weight, bias, history, y, final, x_b, x_t, length, width,
    SILU: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    HISTORY: tl.constexpr = TAPS - 1
    batch, _, start, channel, inside = _place(length, width, S, T, I)
    x += batch * x_b + channel
    y += batch * length * width + channel
    if history is not None:
        history += batch * width * HISTORY
    kernel = _taps(weight, channel, inside, TAPS, WIDE)
    offset = tl.zeros((1, I), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    window = ()  # the latest first
    for back in tl.static_range(1, TAPS):
        window = window + (_row(x, x_t, start - back, length, history, channel, inside, HISTORY),)
    for group in range(T // K):
        first, found = start + group * K, ()
        for k in tl.static_range(K):
            found = found + (tl.load(x + wide_index(first + k) * x_t, mask=inside & (first + k < length), other=0.0),)
        for k in tl.static_range(K):
            row = found[k].to(tl.float32)
            out = offset + kernel[0] * row
            for back in tl.static_range(1, TAPS):
                out += kernel[back] * window[back - 1]
            if SILU:
                out *= sigmoid(out)
            to = y + wide_index(first + k) * width
            tl.store(to, out.to(y.dtype.element_ty), mask=inside & (first + k < length))
            later = ()
            for back in tl.static_range(1, TAPS):
                later = later + ((row if back == 1 else window[back - 2]),)
            window = later
    if HISTORY > 0:
        final += batch * width * HISTORY + channel * HISTORY + HISTORY + 0 * start
        last = (start + T >= length) & ((start < length) | (start == 0))
        for back in tl.static_range(1, TAPS):
            token = _row(x, x_t, length - back + 0 * start, length, history, channel, inside & last, HISTORY)
            tl.store(final - back, token.to(final.dtype.element_ty), mask=inside & last)


@triton.jit
def backward_kernel(
    dy, dfinal, x, weight, bias, history, dx, partial, dhistory, x_b, x_t, length, width,
    SILU: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """dx, dhistory, and this program's share of dweight and dbias: partial (parts, k + 1, i), the bias last.

    Backwards in time: `pending[j]` is what later positions send to the one j + 1 before this one.
    """
    HISTORY: tl.constexpr = TAPS - 1
    batch, part, start, channel, inside = _place(length, width, S, T, I)
    x += batch * x_b + channel
    dy, dx = dy + batch * length * width + channel, dx + batch * length * width + channel
    if history is not None:
        history += batch * width * HISTORY
    if dfinal is not None:
        dfinal += (batch * width + channel) * HISTORY + HISTORY
    kernel = _taps(weight, channel, inside, TAPS, WIDE)
    offset = tl.zeros((1, I), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    window, pending, dkernel = (), (), ()  # inputs from the position on, back in time
    for back in tl.static_range(1, TAPS):
        window = window + (_row(x, x_t, start + T + HISTORY - back, length, history, channel, inside, HISTORY),)
        pending = pending + (tl.zeros((S, I), tl.float32),)
    for _ in tl.static_range(TAPS):
        dkernel = dkernel + (tl.zeros((S, I), tl.float32),)
    doffset = tl.zeros((S, I), tl.float32)
    for k in tl.static_range(HISTORY):  # positions of the next run
        t = start + T + HISTORY - 1 - k
        oldest = _row(x, x_t, t - HISTORY, length, history, channel, inside, HISTORY)
        dout = tl.load(dy + wide_index(t) * width, mask=inside & (t < length), other=0.0).to(tl.float32)
        window, dout = _through(window, oldest, dout, kernel, offset, SILU, TAPS)
        _, pending = _send(pending, dout, kernel, TAPS)
        window = _drop(window, TAPS)
    for group in range(T // K):
        first, rows, grads = start + T - 1 - group * K, (), ()
        for k in tl.static_range(K):
            rows = rows + (_row(x, x_t, first - k - HISTORY, length, history, channel, inside, HISTORY),)
            grads = grads + (
                tl.load(dy + wide_index(first - k) * width, mask=inside & (first - k < length), other=0.0),
            )
        for k in tl.static_range(K):
            t = first - k
            window, dout = _through(window, rows[k], grads[k].to(tl.float32), kernel, offset, SILU, TAPS)
            grown = ()
            for back in tl.static_range(TAPS):
                grown = grown + (dkernel[back] + dout * window[back],)
            doffset += dout
            whole, pending = _send(pending, dout, kernel, TAPS)
            dkernel, window = grown, _drop(window, TAPS)
            if dfinal is not None:
                mask = inside & (t >= length - HISTORY) & (t < length)
                whole += tl.load(dfinal + t - length, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + wide_index(t) * width, whole.to(dx.dtype.element_ty), mask=inside & (t < length))
    partial += part * (TAPS + 1) * width + channel
    for back in tl.static_range(TAPS):
        tl.store(partial + (HISTORY - back) * width, tl.sum(dkernel[back], 0)[None, :], mask=inside)
    tl.store(partial + TAPS * width, tl.sum(doffset, 0)[None, :], mask=inside)
    if dhistory is not None:
        dhistory += (batch * width + channel) * HISTORY + HISTORY
        for back in tl.static_range(1, TAPS):
            sent = pending[back - 1]
            if dfinal is not None:  # a row that is shorter than its history passes some of that on
                mask = inside & (length + back <= HISTORY) & (start == 0)
                sent += tl.load(dfinal - length - back + 0 * start, mask=mask, other=0.0).to(tl.float32)
            tl.store(dhistory - back + 0 * start, sent.to(dhistory.dtype.element_ty), mask=inside & (start == 0))


@triton.jit
def _through(window, oldest, dout, kernel, offset, SILU: tl.constexpr, TAPS: tl.constexpr):
    """The whole window of a position, and the gradient of what the activation saw there."""
    window = window + (oldest,)
    if SILU:
        out = offset
        for back in tl.static_range(TAPS):
            out += kernel[back] * window[back]
        open = sigmoid(out)
        dout *= open * (1.0 + out * (1.0 - open))
    return window, dout


@triton.jit
def _send(pending, dout, kernel, TAPS: tl.constexpr):
    """A position's own gradient, now complete, and what is on its way to those before it."""
    own, sent = kernel[0] * dout, ()
    if TAPS > 1:
        own += pending[0]
    for back in tl.static_range(1, TAPS):
        moved = kernel[back] * dout
        if back < TAPS - 1:
            moved += pending[back]
        sent = sent + (moved,)
    return own, sent


@triton.jit
def _drop(window, TAPS: tl.constexpr):
    """The window without its latest position."""
    rest = ()
    for back in tl.static_range(1, TAPS):
        rest = rest + (window[back],)
    return rest


@triton.jit
def sum_kernel(partial, dweight, dbias, parts, width, TAPS: tl.constexpr, R: tl.constexpr, I: tl.constexpr):
    """dweight (i, k) and dbias (i,) from their shares: one program a tile of channels of one tap."""
    tiles = tl.cdiv(width, I)
    tap = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * I + tl.arange(0, I)
    inside = channel < width
    total = tl.zeros((R, I), tl.float32)
    for first in range(0, parts, R):
        part = first + tl.arange(0, R)
        rows = partial + (wide_index(part) * (TAPS + 1) + tap)[:, None] * width + channel[None, :]
        total += tl.load(rows, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(total, 0)
    tl.store(dweight + channel * TAPS + tap, total.to(dweight.dtype.element_ty), mask=inside & (tap < TAPS))
    if dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), mask=inside & (tap == TAPS))
