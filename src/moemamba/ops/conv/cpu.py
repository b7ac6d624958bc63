"""Causal depthwise convolution on the CPU: a task walks a tile of channels of one row through time.

A task keeps a window on the inputs of the current sequence, which is all that padding and sequence boundaries have to
know about: padding does not enter it, and a new sequence empties it. The backward pass walks forward in time too, with
a window of gradients that are finished once no later position sees their input.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import (
    TILE,
    Rows,
    Streams,
    address,
    by_channel,
    bytes_at,
    cast,
    exact,
    exact_kernel,
    floats,
    fma,
    inner,
    integers,
    kernel,
    load,
    new,
    plain,
    read,
    readable,
    rows,
    run,
    sigmoid,
    silu,
    store,
    streaming,
    summed,
    write,
)
from ..kit.op import gradient, op, where_given
from ..packing import BEGIN, PADDING, position_marks

_ZERO, _ONE = np.float32(0), np.float32(1)
_CHUNK = 32  # positions that are fetched together, to hide the memory behind each other
_NOWHERE = -(1 << 62)  # the place of a row of the window that holds no input


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.causal_conv1d`."""
    dtype = x.dtype
    history = None if initial_state is None else cast(initial_state, dtype)
    x, weight, bias, history = readable(x), plain(weight), plain(bias), by_channel(history)
    marks = None if seq_idx is None else position_marks(seq_idx)
    y, final_state = _forward(x, weight, bias, history, activation == "silu", marks)
    return cast(y, dtype), cast(final_state.transpose(1, 2), dtype)


# --- the two kernels ---


# Rows are copied by explicit loops: of `a[i] = b[j]` numba first copies the right side, in case they overlap, and
# compiles for seconds what it would say of shapes that do not fit.


def _space(k: int, length: int, backward: bool) -> int:
    """Numbers that a kernel keeps on the way."""
    rows = min(_CHUNK, length)
    if backward:
        return (2 * k + 4 + 2 * rows + 2 * (k - 1 + rows)) * TILE + 2 * (k - 1 + rows)  # the last are integers
    return (2 * k + 3 * rows) * TILE


@exact
def _convolve(out: Any, bias: Any, taps: Any, window: Any, row: int) -> None:
    """out = bias + sum_tap taps[tap] window[row + tap]."""
    for c in range(TILE):
        out[c] = bias[c]
    for tap in range(taps.shape[0]):
        for c in range(TILE):
            out[c] = fma(taps[tap, c], window[row + tap, c], out[c])


@exact_kernel
def _conv(
    first: int,
    last: int,
    spare: int,
    at: Streams,
    shape: Rows,
    x: Rows,
    y: Rows,
    weight: int,
    bias: int,
    activates: bool,
    initial_state: int,
    final_state: int,
    marks: int,
) -> None:
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    rows, line = min(_CHUNK, length), 4 * TILE
    taps, shift = floats(spare, (k, TILE)), floats(spare + k * line, TILE)
    outs = spare + (k + 1) * line
    out, block = floats(outs, (rows, TILE)), floats(outs + rows * line, (rows, TILE))
    window = floats(outs + 2 * rows * line, (k - 1 + rows, TILE))
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        if count < TILE:
            load(at, block, TILE, 0, 0, 0, rows, 0)  # zeros, for the idle lanes
        load(at, taps, TILE, weight + 4 * k * channel, 4, 4 * k, k, count)
        load(at, shift, TILE, bias + 4 * channel if bias else 0, 0, 4, 1, count)
        history = 4 * ((k - 1) * width * b + channel)
        load(at, window, TILE, initial_state + history if initial_state else 0, 4 * width, 4, k - 1, count)
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(at, block, TILE, size, x, b, start, channel, count)
            top = k - 1  # rows of the window that are filled
            for j in range(size):
                own = floats(outs + j * line, TILE)
                if marks and mark[b, start + j] == PADDING:
                    for c in range(TILE):
                        own[c] = _ZERO  # and silu(0) = 0
                    continue
                if marks and mark[b, start + j] == BEGIN:
                    top = k - 1
                    load(at, window, TILE, 0, 0, 0, top, 0)
                for c in range(TILE):
                    window[top, c] = block[j, c]
                top += 1
                _convolve(own, shift, taps, window, top - k)
            for j in range(k - 1):
                for c in range(TILE):
                    window[j, c] = window[top - k + 1 + j, c]
            if activates:
                for j in range(size):
                    for c in range(TILE):
                        out[j, c] = silu(out[j, c])
            write(at, out, TILE, size, y, b, start, channel, count)
        store(at, window, TILE, final_state + history, 4 * width, 4, k - 1, count)


@inner
def _flush(
    at: Streams, done: int, place: Any, rows: int, dx: Rows, history: Rows, b: int, first: int, count: int
) -> None:
    """Hand over the finished gradients in the first `rows` of the window: of the input at position `place`, or of
    column `-1 - place` of the history."""
    for j in range(rows):
        if place[j] >= 0:
            write(at, done + 4 * TILE * j, TILE, 1, dx, b, place[j], first, count)
        elif place[j] != _NOWHERE:
            write(at, done + 4 * TILE * j, TILE, 1, history, b, -1 - place[j], first, count)


@kernel
def _conv_backward(
    first: int,
    last: int,
    spare: int,
    at: Streams,
    shape: Rows,
    x: Rows,
    weight: int,
    bias: int,
    silu: bool,
    initial_state: int,
    marks: int,
    dy: Rows,
    dfinal_state: int,
    dx: Rows,
    dweight: int,
    dbias: int,
    dinitial_state: Rows,
) -> None:
    """All gradients; those of weight and bias stay apart by row."""
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    rows, line = min(_CHUNK, length), 4 * TILE
    taps, dtaps = floats(spare, (k, TILE)), floats(spare + k * line, (k, TILE))
    rest = spare + 2 * k * line
    shift, dshift = floats(rest, TILE), floats(rest + line, TILE)
    out, nothing = floats(rest + 2 * line, TILE), rest + 3 * line
    rest += 4 * line
    block, g = floats(rest, (rows, TILE)), floats(rest + rows * line, (rows, TILE))
    rest += 2 * rows * line
    held = k - 1 + rows
    window, dwindow, done = floats(rest, (held, TILE)), floats(rest + held * line, (held, TILE)), rest + held * line
    place = integers(rest + 2 * held * line, held)
    load(at, nothing, TILE, 0, 0, 0, 1, 0)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        if count < TILE:
            load(at, block, TILE, 0, 0, 0, 2 * rows, 0)  # and g: zeros, for the idle lanes
        load(at, taps, TILE, weight + 4 * k * channel, 4, 4 * k, k, count)
        load(at, shift, TILE, bias + 4 * channel if bias else 0, 0, 4, 1, count)
        history = 4 * ((k - 1) * width * b + channel)
        load(at, window, TILE, initial_state + history if initial_state else 0, 4 * width, 4, k - 1, count)
        load(at, dtaps, TILE, 0, 0, 0, k, 0)
        load(at, dshift, TILE, 0, 0, 0, 1, 0)
        load(at, dwindow, TILE, 0, 0, 0, k - 1, 0)
        for j in range(k - 1):
            place[j] = -1 - j
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(at, block, TILE, size, x, b, start, channel, count)
            read(at, g, TILE, size, dy, b, start, channel, count)
            top = k - 1
            for j in range(size):
                if marks and mark[b, start + j] == PADDING:
                    write(at, nothing, TILE, 1, dx, b, start + j, channel, count)
                    continue
                if marks and mark[b, start + j] == BEGIN:
                    _flush(at, done, place, top, dx, dinitial_state, b, channel, count)
                    top = k - 1
                    load(at, window, TILE, 0, 0, 0, top, 0)
                    load(at, dwindow, TILE, 0, 0, 0, top, 0)
                    for row in range(top):
                        place[row] = _NOWHERE
                for c in range(TILE):
                    window[top, c] = block[j, c]
                    dwindow[top, c] = _ZERO
                place[top] = start + j
                top += 1
                if silu:
                    _convolve(out, shift, taps, window, top - k)
                    for c in range(TILE):
                        open_ = sigmoid(out[c])
                        g[j, c] *= open_ * (_ONE + out[c] * (_ONE - open_))
                for tap in range(k):
                    row = top - k + tap
                    for c in range(TILE):
                        dtaps[tap, c] += g[j, c] * window[row, c]
                        dwindow[row, c] += g[j, c] * taps[tap, c]
                for c in range(TILE):
                    dshift[c] += g[j, c]
            keep = top - (k - 1)  # the rows that later positions still see
            _flush(at, done, place, keep, dx, dinitial_state, b, channel, count)
            for j in range(k - 1):
                for c in range(TILE):
                    window[j, c] = window[keep + j, c]
                    dwindow[j, c] = dwindow[keep + j, c]
                place[j] = place[keep + j]
        for j in range(k - 1):
            dlast = floats(dfinal_state + history + 4 * width * j, count)
            for c in range(count):
                dwindow[j, c] += dlast[c]
        _flush(at, done, place, k - 1, dx, dinitial_state, b, channel, count)
        at_channel = 4 * (b * width + channel)
        store(at, dtaps, TILE, dweight + k * at_channel, 4, 4 * k, k, count)
        store(at, dshift, TILE, dbias + at_channel, 0, 4, 1, count)


# --- what torch.compile and autograd see ---


def _outputs(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)


@op("cpu_causal_conv1d", fake=_outputs)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, silu: bool, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, _, width), k = x.shape, weight.shape[1]
    y, final_state = _outputs(x, weight)
    run(
        _conv,
        batch * -(-width // TILE),
        x.numel() * k,
        streaming(),
        (*x.shape, k),
        rows(x, *x.shape),
        rows(y, *x.shape),
        address(weight, width, k),
        address(bias, width),
        silu,
        *[address(t, batch, k - 1, width) for t in (history, final_state)],
        address(marks, *x.shape[:2], dtype=torch.int8),
        space=_space(k, x.shape[1], backward=False),
    )
    return y, final_state


@gradient(_forward, outputs="y, final_state", of="x, weight, bias, history")
def _backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    silu: bool,
    marks: Tensor | None,
) -> list[Tensor]:
    (batch, _, width), k = x.shape, weight.shape[1]
    dy = torch.zeros_like(x) if dy is None else readable(dy)
    dfinal_state = new(batch, k - 1, width).zero_() if dfinal_state is None else plain(dfinal_state)
    dx = new(*x.shape, dtype=x.dtype)
    dweight, dbias, dhistory = new(batch, width, k), new(batch, width), new(batch, k - 1, width)
    run(
        _conv_backward,
        batch * -(-width // TILE),
        x.numel() * k,
        streaming(),
        (*x.shape, k),
        rows(x, *x.shape),
        address(weight, width, k),
        address(bias, width),
        silu,
        address(history, batch, k - 1, width),
        address(marks, *x.shape[:2], dtype=torch.int8),
        rows(dy, *x.shape),
        address(dfinal_state, batch, k - 1, width),
        rows(dx, *x.shape),
        address(dweight, batch, width, k),
        address(dbias, batch, width),
        rows(dhistory, batch, k - 1, width),
        space=_space(k, x.shape[1], backward=True),
    )
    return where_given((x, weight, bias, history), dx, summed(dweight), summed(dbias), dhistory)
