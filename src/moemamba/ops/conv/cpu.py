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
    clear,
    exact,
    exact_kernel,
    floats,
    fma,
    inner,
    kernel,
    load_columns,
    load_tile,
    new,
    plain,
    read,
    readable,
    rows,
    run,
    sigmoid,
    silu,
    store_columns,
    store_tile,
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


@exact
def _convolve(out: Any, j: int, bias: Any, taps: Any, window: Any, row: int) -> None:
    """out[j] = bias + sum_tap taps[tap] window[row + tap]."""
    for c in range(TILE):
        out[j, c] = bias[0, c]
    for tap in range(taps.shape[0]):
        for c in range(TILE):
            out[j, c] = fma(taps[tap, c], window[row + tap, c], out[j, c])


@exact_kernel
def _conv(
    first: int,
    last: int,
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
    chunk = min(_CHUNK, length)
    taps, shift = np.empty((k, TILE), np.float32), np.empty((1, TILE), np.float32)
    block, out = np.zeros((chunk, TILE), np.float32), np.empty((chunk, TILE), np.float32)
    window = np.empty((k - 1 + chunk, TILE), np.float32)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        history = 4 * (k - 1) * width * b
        load_tile(window[: k - 1], initial_state + history if initial_state else 0, width, channel, count)
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(at, block, 0, size, x, b, start, channel, count)
            top = k - 1  # rows of the window that are filled
            for j in range(size):
                if marks and mark[b, start + j] == PADDING:
                    clear(out, j, j + 1)  # and silu(0) = 0
                    continue
                if marks and mark[b, start + j] == BEGIN:
                    top = k - 1
                    clear(window, 0, top)
                for c in range(TILE):
                    window[top, c] = block[j, c]
                top += 1
                _convolve(out, j, shift, taps, window, top - k)
            for j in range(k - 1):
                for c in range(TILE):
                    window[j, c] = window[top - k + 1 + j, c]
            if activates:
                for j in range(size):
                    for c in range(TILE):
                        out[j, c] = silu(out[j, c])
            write(at, out, 0, size, y, b, start, channel, count)
        store_tile(final_state + history, width, channel, count, window[: k - 1])


@inner
def _flush(at: Streams, dwindow: Any, place: Any, dx: Rows, dhistory: Any, b: int, first: int, count: int) -> None:
    """Hand over finished gradients: of the input at position `place`, or of column `-1 - place` of the history."""
    for j in range(place.shape[0]):
        if place[j] >= 0:
            write(at, dwindow, j, 1, dx, b, place[j], first, count)
        elif place[j] != _NOWHERE:
            for c in range(count):
                dhistory[b, -1 - place[j], first + c] = dwindow[j, c]


@kernel
def _conv_backward(
    first: int,
    last: int,
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
    dinitial_state: int,
) -> None:
    """All gradients; those of weight and bias stay apart by row."""
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    chunk = min(_CHUNK, length)
    dhistory = floats(dinitial_state, (batch, k - 1, width))
    dfinal = floats(dfinal_state, (batch, k - 1, width))
    taps, dtaps = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32)
    shift, dshift = np.empty((1, TILE), np.float32), np.empty((1, TILE), np.float32)
    block, g = np.zeros((chunk, TILE), np.float32), np.zeros((chunk, TILE), np.float32)
    window, dwindow = np.empty((k - 1 + chunk, TILE), np.float32), np.empty((k - 1 + chunk, TILE), np.float32)
    place = np.empty(k - 1 + chunk, np.int64)
    out, nothing = np.empty((1, TILE), np.float32), np.zeros((1, TILE), np.float32)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        history = 4 * (k - 1) * width * b
        load_tile(window[: k - 1], initial_state + history if initial_state else 0, width, channel, count)
        clear(dtaps, 0, k)
        clear(dshift, 0, 1)
        clear(dwindow, 0, k - 1)
        for j in range(k - 1):
            place[j] = -1 - j
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(at, block, 0, size, x, b, start, channel, count)
            read(at, g, 0, size, dy, b, start, channel, count)
            top = k - 1
            for j in range(size):
                if marks and mark[b, start + j] == PADDING:
                    write(at, nothing, 0, 1, dx, b, start + j, channel, count)
                    continue
                if marks and mark[b, start + j] == BEGIN:
                    _flush(at, dwindow, place[:top], dx, dhistory, b, channel, count)
                    top = k - 1
                    clear(window, 0, top)
                    clear(dwindow, 0, top)
                    for row in range(top):
                        place[row] = _NOWHERE
                for c in range(TILE):
                    window[top, c] = block[j, c]
                    dwindow[top, c] = _ZERO
                place[top] = start + j
                top += 1
                if silu:
                    _convolve(out, 0, shift, taps, window, top - k)
                    for c in range(TILE):
                        open_ = sigmoid(out[0, c])
                        g[j, c] *= open_ * (_ONE + out[0, c] * (_ONE - open_))
                for tap in range(k):
                    row = top - k + tap
                    for c in range(TILE):
                        dtaps[tap, c] += g[j, c] * window[row, c]
                        dwindow[row, c] += g[j, c] * taps[tap, c]
                for c in range(TILE):
                    dshift[0, c] += g[j, c]
            keep = top - (k - 1)  # the rows that later positions still see
            _flush(at, dwindow, place[:keep], dx, dhistory, b, channel, count)
            for j in range(k - 1):
                for c in range(TILE):
                    window[j, c] = window[keep + j, c]
                    dwindow[j, c] = dwindow[keep + j, c]
                place[j] = place[keep + j]
        for j in range(k - 1):
            for c in range(count):
                dwindow[j, c] += dfinal[b, j, channel + c]
        _flush(at, dwindow, place[: k - 1], dx, dhistory, b, channel, count)
        store_columns(dweight, b * width + channel, count, dtaps)
        store_columns(dbias, b * width + channel, count, dshift)


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
        address(dhistory, batch, k - 1, width),
    )
    return where_given((x, weight, bias, history), dx, summed(dweight), summed(dbias), dhistory)
