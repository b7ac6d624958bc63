"""Selective scan on the CPU: a task walks a tile of channels of one row through time, its states in the first cache.

The backward pass starts from states that the forward pass kept every `CHUNK` positions and recomputes those between.
dB and dC are summed over a tile's channels in the kernel and over tiles afterwards, in the tiles' order.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .cpu_kernel import (
    FAST,
    LN2,
    LOG2E,
    PADDING,
    Rows,
    START,
    TILE,
    address,
    bytes_at,
    exp2,
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
    softplus,
    store_columns,
    summed,
    traced,
    wants_grad,
    write,
)

CHUNK = 32  # positions between two states that are kept

_ZERO, _ONE = np.float32(0), np.float32(1)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.selective_scan`."""
    dtype = u.dtype
    u, dt, B, C, z = (readable(t) for t in (u, dt, B, C, z))
    A, D, dt_bias, initial_state = (plain(t) for t in (A, D, dt_bias, initial_state))
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    op = _forward if traced(*tensors) else _run_forward
    y, final_state, _ = op(*tensors, dt_softplus, marks(seq_idx), wants_grad(*tensors))
    return y.to(dtype), final_state


# --- the two kernels ---


@numba.njit(fastmath=FAST, error_model="numpy")
def _load_step(row: Any, bias: Any, positive: bool) -> None:
    for c in range(TILE):
        row[c] += bias[c]
        if positive:
            row[c] = softplus(row[c])


@kernel
def _scan(
    first: int,
    last: int,
    shape: Rows,
    u: Rows,
    dt: Rows,
    B: Rows,
    C: Rows,
    z: Rows,
    y: Rows,
    A: int,
    D: int,
    dt_bias: int,
    dt_softplus: bool,
    initial_state: int,
    final_state: int,
    marks: int,
    kept: int,
) -> None:
    batch, length, width, n = shape
    tiles = (width + TILE - 1) // TILE
    chunks = (length + CHUNK - 1) // CHUNK
    mark = bytes_at(marks, (batch, length))
    checkpoints = floats(kept, (batch, tiles, chunks, n, TILE))
    h, decay = np.empty((n, TILE), np.float32), np.empty((n, TILE), np.float32)
    vectors, Bt, Ct = np.zeros((6, TILE), np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    skip, bias, x, step, drive, out = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5]
    for task in range(first, last):
        b, tile = task // tiles, task % tiles
        channel = tile * TILE
        count = min(TILE, width - channel)
        load_columns(decay, A, channel, count)
        decay *= LOG2E  # exp(dt A) = 2^(dt decay)
        vectors[:] = _ZERO
        load_columns(vectors[:1], D, channel, count)
        load_columns(vectors[1:2], dt_bias, channel, count)
        load_columns(h, initial_state, b * width + channel, count)
        for t in range(length):
            if kept and t % CHUNK == 0:
                checkpoints[b, tile, t // CHUNK] = h
            if marks and mark[b, t] == PADDING:
                out[:] = _ZERO
                write(out, y, b, t, channel, count)
                continue
            if marks and mark[b, t] == START:
                h[:] = _ZERO
            read(x, u, b, t, channel, count)
            read(step, dt, b, t, channel, count)
            read(Bt, B, b, t, 0, n)
            read(Ct, C, b, t, 0, n)
            _load_step(step, bias, dt_softplus)
            for c in range(TILE):
                drive[c] = step[c] * x[c]
                out[c] = skip[c] * x[c]
            for s in range(n):
                for c in range(TILE):
                    h[s, c] = exp2(step[c] * decay[s, c]) * h[s, c] + drive[c] * Bt[s]
                    out[c] += Ct[s] * h[s, c]
            if z[0]:
                read(x, z, b, t, channel, count)
                for c in range(TILE):
                    out[c] *= x[c] * sigmoid(x[c])
            write(out, y, b, t, channel, count)
        store_columns(final_state, b * width + channel, count, h)


@kernel
def _scan_backward(
    first: int,
    last: int,
    shape: Rows,
    u: Rows,
    dt: Rows,
    B: Rows,
    C: Rows,
    z: Rows,
    A: int,
    D: int,
    dt_bias: int,
    dt_softplus: bool,
    marks: int,
    kept: int,
    dy: Rows,
    dfinal_state: int,
    du: Rows,
    ddt: Rows,
    dz: Rows,
    dA: int,
    dB: int,
    dC: int,
    dD: int,
    ddt_bias: int,
    dinitial_state: int,
) -> None:
    batch, length, width, n = shape
    tiles = (width + TILE - 1) // TILE
    chunks = (length + CHUNK - 1) // CHUNK
    mark = bytes_at(marks, (batch, length))
    checkpoints = floats(kept, (batch, tiles, chunks, n, TILE))
    dB_of_tile, dC_of_tile = floats(dB, (tiles, batch, length, n)), floats(dC, (tiles, batch, length, n))
    dD_of_row, dbias_of_row = floats(dD, (batch, width)), floats(ddt_bias, (batch, width))
    # One chunk, recomputed: the state before each position (and after the last), its decay, and what was derived from
    # the inputs on the way.
    h, a = np.empty((CHUNK + 1, n, TILE), np.float32), np.empty((CHUNK, n, TILE), np.float32)
    x, step = np.zeros((CHUNK, TILE), np.float32), np.zeros((CHUNK, TILE), np.float32)
    slope, out = np.zeros((CHUNK, TILE), np.float32), np.empty((CHUNK, TILE), np.float32)
    Bt, Ct = np.empty((CHUNK, n), np.float32), np.empty((CHUNK, n), np.float32)
    decay, dh, ddecay = (
        np.empty((n, TILE), np.float32),
        np.empty((n, TILE), np.float32),
        np.empty((n, TILE), np.float32),
    )
    vectors = np.zeros((9, TILE), np.float32)
    skip, bias, drive, g, gate = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    dx, dstep, dskip, dbias = vectors[5], vectors[6], vectors[7], vectors[8]
    for task in range(first, last):
        b, tile = task // tiles, task % tiles
        channel = tile * TILE
        count = min(TILE, width - channel)
        load_columns(decay, A, channel, count)
        decay *= LOG2E  # exp(dt A) = 2^(dt decay)
        vectors[:] = _ZERO
        load_columns(vectors[:1], D, channel, count)
        load_columns(vectors[1:2], dt_bias, channel, count)
        load_columns(dh, dfinal_state, b * width + channel, count)
        ddecay[:] = _ZERO
        x[:] = _ZERO
        for chunk in range(chunks - 1, -1, -1):
            start = chunk * CHUNK
            stop = min(start + CHUNK, length)
            h[0] = checkpoints[b, tile, chunk]
            for t in range(start, stop):
                j = t - start
                if marks and mark[b, t] == PADDING:
                    h[j + 1] = h[j]
                    continue
                keep = _ZERO if marks and mark[b, t] == START else _ONE
                read(x[j], u, b, t, channel, count)
                read(step[j], dt, b, t, channel, count)
                read(Bt[j], B, b, t, 0, n)
                read(Ct[j], C, b, t, 0, n)
                if dt_softplus:
                    for c in range(TILE):
                        slope[j, c] = sigmoid(step[j, c] + bias[c])
                _load_step(step[j], bias, dt_softplus)
                for c in range(TILE):
                    drive[c] = step[j, c] * x[j, c]
                    out[j, c] = skip[c] * x[j, c]
                for s in range(n):
                    for c in range(TILE):
                        a[j, s, c] = keep * exp2(step[j, c] * decay[s, c])
                        h[j + 1, s, c] = a[j, s, c] * h[j, s, c] + drive[c] * Bt[j, s]
                        out[j, c] += Ct[j, s] * h[j + 1, s, c]
            for t in range(stop - 1, start - 1, -1):
                j = t - start
                if marks and mark[b, t] == PADDING:
                    dx[:] = _ZERO
                    write(dx, du, b, t, channel, count)
                    write(dx, ddt, b, t, channel, count)
                    if z[0]:
                        write(dx, dz, b, t, channel, count)
                    dB_of_tile[tile, b, t] = _ZERO
                    dC_of_tile[tile, b, t] = _ZERO
                    continue
                read(g, dy, b, t, channel, count)
                if z[0]:
                    read(gate, z, b, t, channel, count)
                    for c in range(TILE):
                        open_ = sigmoid(gate[c])
                        dx[c] = g[c] * out[j, c] * open_ * (_ONE + gate[c] * (_ONE - open_))
                        g[c] *= gate[c] * open_
                    write(dx, dz, b, t, channel, count)
                for c in range(TILE):
                    drive[c] = step[j, c] * x[j, c]
                    dx[c] = _ZERO
                    dstep[c] = _ZERO
                    dskip[c] += g[c] * x[j, c]
                for s in range(n):
                    dBt = dCt = _ZERO
                    for c in range(TILE):
                        dhc = dh[s, c] + g[c] * Ct[j, s]
                        dCt += g[c] * h[j + 1, s, c]
                        dBt += dhc * drive[c]
                        dx[c] += dhc * Bt[j, s]
                        dhc *= a[j, s, c]
                        dh[s, c] = dhc
                        through = dhc * h[j, s, c]
                        ddecay[s, c] += through * step[j, c]
                        dstep[c] += through * decay[s, c]
                    dB_of_tile[tile, b, t, s] = dBt
                    dC_of_tile[tile, b, t, s] = dCt
                for c in range(TILE):
                    dstep[c] = LN2 * dstep[c] + dx[c] * x[j, c]
                    if dt_softplus:
                        dstep[c] *= slope[j, c]
                    dbias[c] += dstep[c]
                    dx[c] = dx[c] * step[j, c] + skip[c] * g[c]
                write(dx, du, b, t, channel, count)
                write(dstep, ddt, b, t, channel, count)
        store_columns(dA, b * width + channel, count, ddecay)
        store_columns(dinitial_state, b * width + channel, count, dh)
        dD_of_row[b, channel : channel + count] = dskip[:count]
        dbias_of_row[b, channel : channel + count] = dbias[:count]


# --- custom ops: what torch.compile and autograd see ---


def _run_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    marks: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (empty unless `keep`)."""
    y, final_state, kept = _outputs(u, A, keep)
    shape, tiles = (*u.shape, A.shape[1]), -(-u.shape[2] // TILE)
    streams = [rows(t) for t in (u, dt, B, C, z, y)]
    parameters = [address(t) for t in (A, D, dt_bias)]
    states = [address(t) for t in (initial_state, final_state, marks)]
    work = u.numel() * A.shape[1]
    run(
        _scan,
        u.shape[0] * tiles,
        work,
        shape,
        *streams,
        *parameters,
        dt_softplus,
        *states,
        address(kept) if keep else 0,
    )
    return y, final_state, kept


def _outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = u.shape
    kept = (batch, -(-width // TILE), -(-length // CHUNK), A.shape[1], TILE) if keep else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty(batch, width, A.shape[1], dtype=torch.float32),
        u.new_empty(kept, dtype=torch.float32),
    )


_forward = torch.library.custom_op("moemamba::cpu_selective_scan", _run_forward, mutates_args=())


@_forward.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, rest[-1])


@torch.library.custom_op("moemamba::cpu_selective_scan_backward", mutates_args=())
def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    marks: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal_state: Tensor,
) -> list[Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state; those of absent arguments mean nothing."""
    (batch, length, width), n, tiles = u.shape, A.shape[1], kept.shape[1]
    new = torch.empty
    du, ddt, dz = new(u.shape, dtype=u.dtype), new(u.shape, dtype=dt.dtype), None
    if z is not None:
        dz = new(u.shape, dtype=z.dtype)
    dA, dstate = new(batch, width, n), new(batch, width, n)
    dB, dC = new(tiles, batch, length, n), new(tiles, batch, length, n)
    dD, dbias = new(batch, width), new(batch, width)
    run(
        _scan_backward,
        batch * tiles,
        u.numel() * n,
        (batch, length, width, n),
        *[rows(t) for t in (u, dt, B, C, z)],
        *[address(t) for t in (A, D, dt_bias)],
        dt_softplus,
        address(marks),
        address(kept),
        rows(dy),
        address(dfinal_state),
        *[rows(t) for t in (du, ddt, dz)],
        *[address(t) for t in (dA, dB, dC, dD, dbias, dstate)],
    )
    sums = [summed(dA), summed(dB).to(B.dtype), summed(dC).to(C.dtype), summed(dD)]
    return [du, ddt, *sums, du.new_empty(0) if dz is None else dz, summed(dbias), dstate]


@_backward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    batch, _, width = u.shape
    dvector = A.new_empty(width)
    return [
        *[torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt, A, B, C)],
        dvector,
        u.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format),
        torch.empty_like(dvector),
        A.new_empty(batch, width, A.shape[1]),
    ]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, ctx.dt_softplus, marks, _ = inputs
    ctx.has_initial_state = initial_state is not None
    ctx.save_for_backward(*tensors, marks, output[2])


def _differentiate(ctx: Any, dy: Tensor, dfinal_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, marks, kept = ctx.saved_tensors
    inputs = (*tensors, ctx.dt_softplus, marks, kept, readable(dy), plain(dfinal_state))
    *gradients, dstate = _backward(*inputs)
    absent = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    return (*absent, dstate if ctx.has_initial_state else None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
