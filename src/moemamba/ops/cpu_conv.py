"""Causal depthwise convolution on the CPU: a task walks a tile of channels of one row through time.

The last k inputs stay in a ring, which is all that padding and sequence boundaries have to know about: padding leaves it
alone, a new sequence empties it. The backward pass walks forward in time too, with a ring of gradients beside it.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .cpu_kernel import (
    FAST,
    PADDING,
    START,
    TILE,
    Rows,
    address,
    bytes_at,
    floats,
    kernel,
    load_columns,
    marks,
    plain,
    read,
    readable,
    rows,
    run,
    sigmoid,
    store_columns,
    summed,
    traced,
    write,
)

_ZERO, _ONE = np.float32(0), np.float32(1)
_NOWHERE = 1 << 62  # the place of a slot that no input has filled


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
    history = None if initial_state is None else initial_state.to(dtype)
    tensors = (readable(x), plain(weight), plain(bias), plain(history))
    op = _forward if traced(*tensors) else _run_forward
    y, final_state = op(*tensors, activation == "silu", marks(seq_idx))
    return y.to(dtype), final_state.to(dtype)


# --- the two kernels ---


@numba.njit(fastmath=FAST, error_model="numpy")
def _convolve(out: Any, bias: Any, taps: Any, ring: Any, now: int) -> None:
    """out = bias + sum_j taps_j x_(now - k + 1 + j), the inputs by their place in the ring."""
    k = taps.shape[0]
    out[:] = bias
    for j in range(k):
        row = ring[(now + 1 + j) % k]
        for c in range(TILE):
            out[c] += taps[j, c] * row[c]


@kernel
def _conv(
    first: int,
    last: int,
    shape: Rows,
    x: Rows,
    y: Rows,
    weight: int,
    bias: int,
    silu: bool,
    initial_state: int,
    final_state: int,
    marks: int,
) -> None:
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    ring, taps = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32)
    out, shift = np.empty(TILE, np.float32), np.empty((1, TILE), np.float32)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        ring[:] = _ZERO
        load_columns(ring[: k - 1], initial_state, b * width + channel, count)
        now = k - 1  # how many inputs, the history counted, came before; the ring holds input j in slot j % k
        for t in range(length):
            if marks and mark[b, t] == PADDING:
                out[:] = _ZERO
                write(out, y, b, t, channel, count)
                continue
            if marks and mark[b, t] == START:
                ring[:] = _ZERO
            read(ring[now % k], x, b, t, channel, count)
            _convolve(out, shift[0], taps, ring, now)
            if silu:
                for c in range(TILE):
                    out[c] *= sigmoid(out[c])
            write(out, y, b, t, channel, count)
            now += 1
        target = floats(final_state, (batch, width, k - 1))
        for j in range(k - 1):
            target[b, channel : channel + count, j] = ring[(now + 1 + j) % k, :count]


@numba.njit(fastmath=FAST, error_model="numpy")
def _flush(gradient: Any, place: int, dx: Rows, dinitial_state: Any, b: int, first: int, count: int) -> None:
    """Hand over the finished gradient of the input at a place: a position, or a column of the history counted from -1."""
    if place >= 0 and place != _NOWHERE:
        write(gradient, dx, b, place, first, count)
    elif place < 0:
        dinitial_state[b, first : first + count, -1 - place] = gradient[:count]


@kernel
def _conv_backward(
    first: int,
    last: int,
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
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    ring, dring, taps = (
        np.empty((k, TILE), np.float32),
        np.empty((k, TILE), np.float32),
        np.empty((k, TILE), np.float32),
    )
    place = np.empty(k, np.int64)
    dtaps, shift, dshift = (
        np.empty((k, TILE), np.float32),
        np.empty((1, TILE), np.float32),
        np.empty((1, TILE), np.float32),
    )
    out, g = np.empty(TILE, np.float32), np.zeros(TILE, np.float32)
    dinitial = floats(dinitial_state, (batch, width, k - 1))
    dfinal = floats(dfinal_state, (batch, width, k - 1))
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        dtaps[:] = _ZERO
        dshift[:] = _ZERO
        ring[:] = _ZERO
        dring[:] = _ZERO
        load_columns(ring[: k - 1], initial_state, b * width + channel, count)
        for j in range(k):
            place[j] = -1 - j if j < k - 1 else _NOWHERE
        now = k - 1
        for t in range(length):
            if marks and mark[b, t] == PADDING:
                out[:] = _ZERO
                write(out, dx, b, t, channel, count)
                continue
            if marks and mark[b, t] == START:
                for j in range(k):
                    _flush(dring[j], place[j], dx, dinitial, b, channel, count)
                ring[:] = _ZERO
                place[:] = _NOWHERE
            slot = now % k
            _flush(dring[slot], place[slot], dx, dinitial, b, channel, count)
            place[slot] = t
            dring[slot] = _ZERO
            read(ring[slot], x, b, t, channel, count)
            read(g, dy, b, t, channel, count)
            if silu:
                _convolve(out, shift[0], taps, ring, now)
                for c in range(TILE):
                    open_ = sigmoid(out[c])
                    g[c] *= open_ * (_ONE + out[c] * (_ONE - open_))
            for j in range(k):
                slot = (now + 1 + j) % k
                for c in range(TILE):
                    dtaps[j, c] += g[c] * ring[slot, c]
                    dring[slot, c] += g[c] * taps[j, c]
            for c in range(TILE):
                dshift[0, c] += g[c]
            now += 1
        for j in range(k - 1):
            dring[(now + 1 + j) % k, :count] += dfinal[b, channel : channel + count, j]
        for j in range(k):
            _flush(dring[j], place[j], dx, dinitial, b, channel, count)
        store_columns(dweight, b * width + channel, count, dtaps)
        store_columns(dbias, b * width + channel, count, dshift)


# --- custom ops: what torch.compile and autograd see ---


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, silu: bool, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, _, width), k = x.shape, weight.shape[1]
    y, final_state = _outputs(x, weight)
    run(
        _conv,
        batch * -(-width // TILE),
        x.numel() * k,
        (*x.shape, k),
        rows(x),
        rows(y),
        address(weight),
        address(bias),
        silu,
        *[address(t) for t in (history, final_state, marks)],
    )
    return y, final_state


def _outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1, dtype=torch.float32)


_forward = torch.library.custom_op("moemamba::cpu_causal_conv1d", _run_forward, mutates_args=())


@_forward.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight)


@torch.library.custom_op("moemamba::cpu_causal_conv1d_backward", mutates_args=())
def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    silu: bool,
    marks: Tensor | None,
    dy: Tensor,
    dfinal_state: Tensor,
) -> list[Tensor]:
    """Gradients of x, weight, bias and history; those of absent arguments mean nothing."""
    (batch, _, width), k = x.shape, weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight, dbias, dhistory = (torch.empty(batch, width, *columns) for columns in ((k,), (), (k - 1,)))
    run(
        _conv_backward,
        batch * -(-width // TILE),
        x.numel() * k,
        (*x.shape, k),
        rows(x),
        address(weight),
        address(bias),
        silu,
        address(history),
        address(marks),
        rows(dy),
        address(dfinal_state),
        rows(dx),
        *[address(t) for t in (dweight, dbias, dhistory)],
    )
    return [dx, summed(dweight), summed(dbias), dhistory]


@_backward.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    _, final_state = _outputs(x, weight)
    return [x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(x.shape[2]), final_state]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, marks = inputs
    ctx.save_for_backward(*tensors, marks)


def _differentiate(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, marks = ctx.saved_tensors
    gradients = _backward(*tensors, ctx.silu, marks, readable(dy), plain(dfinal_state))
    return (*[None if t is None else g for t, g in zip(tensors, gradients, strict=True)], None, None)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
