"""Causal depthwise convolution on the CPU: a task walks a tile of channels of one row through time.

The last k inputs stay in a ring, which is all that padding and sequence boundaries have to know about: padding
leaves it alone, a new sequence empties it. The backward pass walks forward in time too, with a ring of gradients.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_kernel import (
    PADDING,
    START,
    TILE,
    Rows,
    address,
    bytes_at,
    floats,
    inner,
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
_CHUNK = 32  # positions that are fetched together, to hide the memory behind each other
_NOWHERE = -(1 << 62)  # the place of a slot that no input has filled


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
    x, weight, bias, history = readable(x), plain(weight), plain(bias), plain(history)
    op = _forward if traced(x, weight, bias, history) else _run_forward
    y, final_state = op(x, weight, bias, history, activation == "silu", marks(seq_idx))
    return y.to(dtype), final_state.to(dtype)


# --- the two kernels ---


@inner
def _convolve(out: Any, bias: Any, taps: Any, ring: Any, now: int) -> None:
    """out = bias + sum_j taps_j x_(now - k + 1 + j), the inputs by their place in the ring."""
    k = taps.shape[0]
    out[:] = bias
    for j in range(k):
        slot = (now + 1 + j) % k
        for c in range(TILE):
            out[c] += taps[j, c] * ring[slot, c]


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
    taps, shift = np.empty((k, TILE), np.float32), np.empty((1, TILE), np.float32)
    block, out = np.zeros((_CHUNK, TILE), np.float32), np.empty((_CHUNK, TILE), np.float32)
    ring = np.empty((k, TILE), np.float32)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        load_columns(ring[: k - 1], initial_state, b * width + channel, count)
        ring[k - 1] = _ZERO
        now = k - 1  # inputs so far, the history counted; input m is in slot m % k of the ring
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(block[:size], x, b, start, channel, count)
            for j in range(size):
                if marks and mark[b, start + j] == PADDING:
                    out[j] = _ZERO  # and silu(0) = 0
                    continue
                if marks and mark[b, start + j] == START:
                    ring[:] = _ZERO
                ring[now % k] = block[j]
                _convolve(out[j], shift[0], taps, ring, now)
                now += 1
            if silu:
                for j in range(size):
                    for c in range(TILE):
                        out[j, c] *= sigmoid(out[j, c])
            write(out[:size], y, b, start, channel, count)
        target = floats(final_state, (batch, width, k - 1))
        for j in range(k - 1):
            target[b, channel : channel + count, j] = ring[(now + 1 + j) % k, :count]


@inner
def _flush(gradient: Any, place: int, dx: Rows, dhistory: Any, b: int, first: int, count: int) -> None:
    """Hand over a finished gradient: of the input at position `place`, or of column `-1 - place` of the history."""
    if place >= 0:
        write(gradient, dx, b, place, first, count)
    elif place != _NOWHERE:
        dhistory[b, first : first + count, -1 - place] = gradient[0, :count]


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
    """All gradients; those of weight and bias stay apart by row."""
    batch, length, width, k = shape
    tiles = (width + TILE - 1) // TILE
    mark = bytes_at(marks, (batch, length))
    dhistory = floats(dinitial_state, (batch, width, k - 1))
    dfinal = floats(dfinal_state, (batch, width, k - 1))
    taps, dtaps = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32)
    shift, dshift = np.empty((1, TILE), np.float32), np.empty((1, TILE), np.float32)
    block, g = np.zeros((_CHUNK, TILE), np.float32), np.zeros((_CHUNK, TILE), np.float32)
    ring, dring, place = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32), np.empty(k, np.int64)
    out, nothing = np.empty(TILE, np.float32), np.zeros((1, TILE), np.float32)
    for task in range(first, last):
        b, channel = task // tiles, task % tiles * TILE
        count = min(TILE, width - channel)
        load_columns(taps, weight, channel, count)
        load_columns(shift, bias, channel, count)
        load_columns(ring[: k - 1], initial_state, b * width + channel, count)
        ring[k - 1] = _ZERO
        dring[:] = _ZERO
        dtaps[:] = _ZERO
        dshift[:] = _ZERO
        for j in range(k):
            place[j] = -1 - j if j < k - 1 else _NOWHERE
        now = k - 1
        for start in range(0, length, _CHUNK):
            size = min(_CHUNK, length - start)
            read(block[:size], x, b, start, channel, count)
            read(g[:size], dy, b, start, channel, count)
            for j in range(size):
                if marks and mark[b, start + j] == PADDING:
                    write(nothing, dx, b, start + j, channel, count)
                    continue
                if marks and mark[b, start + j] == START:
                    for slot in range(k):
                        _flush(dring[slot : slot + 1], place[slot], dx, dhistory, b, channel, count)
                    ring[:] = _ZERO
                    place[:] = _NOWHERE
                slot = now % k
                _flush(dring[slot : slot + 1], place[slot], dx, dhistory, b, channel, count)
                place[slot] = start + j
                dring[slot] = _ZERO
                ring[slot] = block[j]
                if silu:
                    _convolve(out, shift[0], taps, ring, now)
                    for c in range(TILE):
                        open_ = sigmoid(out[c])
                        g[j, c] *= open_ * (_ONE + out[c] * (_ONE - open_))
                for tap in range(k):
                    slot = (now + 1 + tap) % k
                    for c in range(TILE):
                        dtaps[tap, c] += g[j, c] * ring[slot, c]
                        dring[slot, c] += g[j, c] * taps[tap, c]
                for c in range(TILE):
                    dshift[0, c] += g[j, c]
                now += 1
        for j in range(k - 1):
            dring[(now + 1 + j) % k, :count] += dfinal[b, channel : channel + count, j]
        for slot in range(k):
            _flush(dring[slot : slot + 1], place[slot], dx, dhistory, b, channel, count)
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
