# mypy: ignore-errors
"""Triton kernels of the causal depthwise convolution over packed rows; those of whole rows: `triton_kernels.py`.

A position's window is found by index: `source` is a row of x, or if negative a row of the history before it (-1 the
last), or below that nothing, as `packing.taps` says. The forward pass takes a tile of positions and channels. The
backward pass walks a segment of time backwards, since what a position sends back to the tokens before it passes through
them in order; rows that are read again come from the cache.
"""

import triton
import triton.language as tl

from ..kit.triton import BEGIN, PADDING, sigmoid, wide_index


@triton.jit
def _tokens(x, x_t, history, source, channel, inside, HISTORY: tl.constexpr):
    """Rows `source` of x in float32, or of history (i, k - 1) where negative, zeros where neither has them."""
    tokens = tl.load(x + wide_index(source) * x_t + channel, mask=inside & (source >= 0), other=0.0).to(tl.float32)
    if history is not None:
        early = inside & (source < 0) & (source >= -HISTORY)
        tokens += tl.load(history + channel * HISTORY + source + HISTORY, mask=early, other=0.0).to(tl.float32)
    return tokens


@triton.jit
def packed_forward_kernel(
    x, weight, bias, history, sources, y, final, x_b, x_t, length, width,
    SILU: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    HISTORY: tl.constexpr = TAPS - 1
    tiles = tl.cdiv(width, I)
    segments = tl.maximum(tl.cdiv(length, T), 1)
    batch = wide_index(tl.program_id(0) // tiles // segments)
    segment = tl.program_id(0) // tiles % segments
    channel = (tl.program_id(0) % tiles * I + tl.arange(0, I))[None, :]
    time = (segment * T + tl.arange(0, T))[:, None]
    inside = channel < width
    live = inside & (time < length)
    x += batch * x_b
    if history is not None:
        history += batch * width * HISTORY
    sources += batch * (length + 1) * TAPS
    present = live & (tl.load(sources + time * TAPS, mask=time < length, other=-TAPS) >= 0)
    out = tl.zeros((T, I), tl.float32)
    if bias is not None:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(TAPS):
        source = tl.load(sources + time * TAPS + back, mask=time < length, other=-TAPS)
        tap = tl.load(weight + channel * TAPS + HISTORY - back, mask=inside, other=0.0).to(tl.float32)
        out += tap * _tokens(x, x_t, history, source, channel, live, HISTORY)
    if SILU:
        out *= sigmoid(out)
    out = tl.where(present, out, 0.0).to(y.dtype.element_ty)
    tl.store(y + batch * length * width + wide_index(time) * width + channel, out, mask=live)
    if segment == segments - 1:  # the window of a position after the last is the state left behind
        final += batch * width * HISTORY
        for back in tl.static_range(1, TAPS):
            last = tl.load(sources + length * TAPS + back)
            token = _tokens(x, x_t, history, last, channel, inside, HISTORY).to(final.dtype.element_ty)
            tl.store(final + channel * HISTORY + HISTORY - back, token, mask=inside)


@triton.jit
def packed_backward_kernel(
    dy, dfinal, x, weight, bias, history, marks, sources, resume, dx, partial, dhistory,
    x_b, x_t, length, width, segment_length,
    SILU: tl.constexpr, TAPS: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """dx and dhistory, and sums over this segment for dweight and dbias: partial (parts, k + 1, i), the bias last.

    `pending[j]` is what later tokens send to the token j + 1 before this position. The walk begins where tokens after
    the segment can no longer reach into it, at `resume` (b, segments), or at the end of the row with `dfinal`.
    """
    HISTORY: tl.constexpr = TAPS - 1
    tiles = tl.cdiv(width, I)
    segments = tl.maximum(tl.cdiv(length, segment_length), 1)
    part = wide_index(tl.program_id(0) // tiles)
    batch, segment = part // segments, (tl.program_id(0) // tiles) % segments
    channel = tl.program_id(0) % tiles * I + tl.arange(0, I)
    inside = channel < width
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, length)
    x, dy, dx = x + batch * x_b, dy + batch * length * width, dx + batch * length * width
    sources, marks = sources + batch * (length + 1) * TAPS, marks + batch * length
    end = tl.load(resume + part)
    if history is not None:
        history += batch * width * HISTORY
    offset = tl.zeros((I,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    kernel, dkernel, pending = (), (), ()
    for back in tl.static_range(TAPS):
        kernel = kernel + (tl.load(weight + channel * TAPS + HISTORY - back, mask=inside, other=0.0).to(tl.float32),)
        dkernel = dkernel + (tl.zeros((I,), tl.float32),)
    for back in tl.static_range(1, TAPS):
        sent = tl.zeros((I,), tl.float32)
        if dfinal is not None:
            mask = inside & (end == length)
            sent = tl.load(dfinal + (batch * width + channel) * HISTORY + HISTORY - back, mask=mask, other=0.0).to(
                tl.float32
            )
        pending = pending + (sent,)
    doffset = tl.zeros((I,), tl.float32)
    for group in range(tl.cdiv(end - start, K)):
        first = end - 1 - group * K
        windows, douts, found = (), (), ()
        for k in tl.static_range(K):
            t = first - k
            live = inside & (t >= start)
            mark = tl.load(marks + t, mask=t >= start, other=PADDING).to(tl.int32)
            window = ()
            for back in tl.static_range(TAPS):
                source = tl.load(sources + t * TAPS + back, mask=t >= start, other=-TAPS)
                window = window + (_tokens(x, x_t, history, source, channel, live, HISTORY),)
            windows, found = windows + (window,), found + (mark,)
            douts = douts + (tl.load(dy + wide_index(t) * width + channel, mask=live, other=0.0).to(tl.float32),)
        for k in tl.static_range(K):
            t = first - k
            out, dout = offset, douts[k]
            for back in tl.static_range(TAPS):
                out += kernel[back] * windows[k][back]
            if SILU:
                open = sigmoid(out)
                dout *= open * (1.0 + out * (1.0 - open))
            dout = tl.where(found[k] == PADDING, 0.0, dout)
            own = tl.where(t < stop, dout, 0.0)  # positions after the segment count for another program
            doffset += own
            grown, passed, whole = (), (), kernel[0] * dout
            for back in tl.static_range(TAPS):
                grown = grown + (dkernel[back] + own * windows[k][back],)
            if HISTORY > 0:
                whole += pending[0]
            for back in tl.static_range(1, TAPS):
                moved = kernel[back] * dout
                if back < HISTORY:
                    moved += pending[back]
                moved = tl.where(found[k] == BEGIN, 0.0, moved)
                passed = passed + (tl.where(found[k] == PADDING, pending[back - 1], moved),)
            dkernel, pending = grown, passed
            whole = tl.where(found[k] == PADDING, 0.0, whole).to(dx.dtype.element_ty)
            tl.store(dx + wide_index(t) * width + channel, whole, mask=inside & (t >= start) & (t < stop))
    for back in tl.static_range(TAPS):
        tl.store(partial + (part * (TAPS + 1) + HISTORY - back) * width + channel, dkernel[back], mask=inside)
    tl.store(partial + (part * (TAPS + 1) + TAPS) * width + channel, doffset, mask=inside)
    if segment == 0:
        for back in tl.static_range(1, TAPS):
            where = dhistory + (batch * width + channel) * HISTORY + HISTORY - back
            tl.store(where, pending[back - 1].to(dhistory.dtype.element_ty), mask=inside)
