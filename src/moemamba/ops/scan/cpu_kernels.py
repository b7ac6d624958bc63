"""The two kernels of `cpu.py`. A task is a tile of channels of one row, walked through in chunks of time.

A chunk's inputs are fetched together, since a single position's work is too short to hide the memory behind, into
(CHUNK, lanes) blocks; its states stay in the first cache. Lanes beyond a last tile's channels hold zeros or whatever
zeros lead to, and are never written out.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..kit.cpu import (
    LN2,
    LOG2E,
    TILE,
    Rows,
    Streams,
    bytes_at,
    clear,
    exact_kernel,
    exp2,
    floats,
    fma,
    gated,
    inner,
    kernel,
    load_columns,
    load_tile,
    named,
    next_state,
    read,
    sigmoid,
    softplus,
    store_columns,
    store_tile,
    write,
)
from ..packing import BEGIN, PADDING

CHUNK = 32  # positions between two states that the forward pass keeps

_ZERO, _ONE = np.float32(0), np.float32(1)


@inner
def _steps(step: Any, slope: Any, bias: Any, dt_softplus: bool) -> None:
    """step = softplus(step + bias), and its slope; or just the sum."""
    for j in range(step.shape[0]):
        for c in range(step.shape[1]):
            raw = step[j, c] + bias[c]
            step[j, c] = softplus(raw) if dt_softplus else raw
            slope[j, c] = sigmoid(raw) if dt_softplus else _ONE


class Kernels(NamedTuple):
    """Those of one width of tiles."""

    scan: Callable[..., None]
    backward: Callable[..., None]


def lanes(width: int) -> int:
    """Channels of a task: even shares of a layer's, as whole vector registers, TILE at most (96 are two times 48)."""
    share = -(-width // max(1, -(-width // TILE)))
    return max(32, -(-share // 16) * 16)


@cache
def kernels(lanes: int) -> Kernels:
    """The kernels for tiles of so many channels, a constant in them: a loop of unknown length would be half as fast."""

    @exact_kernel
    @named(lanes)
    def scan(
        first: int,
        last: int,
        at: Streams,
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
        """y and the final state of tasks first .. last - 1; the state at the start of every chunk goes to `kept`."""
        batch, length, width, n = shape
        tiles, chunks = (width + lanes - 1) // lanes, (length + CHUNK - 1) // CHUNK
        mark = bytes_at(marks, (batch, length))
        checkpoints = floats(kept, (batch, tiles, chunks, n, lanes))
        rows = min(CHUNK, length)
        blocks = np.zeros((4, rows, lanes), np.float32)
        x, step, out, gate = blocks[0], blocks[1], blocks[2], blocks[3]
        Bt, Ct = np.empty((rows, n), np.float32), np.empty((rows, n), np.float32)
        h, decay = np.empty((n, lanes), np.float32), np.empty((n, lanes), np.float32)
        skip, bias = np.empty((1, lanes), np.float32), np.empty((1, lanes), np.float32)
        drive = np.empty(lanes, np.float32)
        for task in range(first, last):
            b, tile = task // tiles, task % tiles
            channel, count = tile * lanes, min(lanes, width - tile * lanes)
            if count < lanes:
                for block in range(4):  # the idle lanes, which a task before this one may have filled
                    clear(blocks[block], 0, rows)
            load_columns(decay, A, channel, count)
            for s in range(n):
                for c in range(lanes):
                    decay[s, c] *= LOG2E  # exp(dt A) = 2^(dt decay)
            load_columns(skip, D, channel, count)
            load_columns(bias, dt_bias, channel, count)
            state = 4 * n * width * b
            load_tile(h, initial_state + state if initial_state else 0, width, channel, count)
            for chunk in range(chunks):
                start = chunk * CHUNK
                size = min(CHUNK, length - start)
                if kept:
                    for s in range(n):
                        for c in range(lanes):
                            checkpoints[b, tile, chunk, s, c] = h[s, c]
                read(at, x, 0, size, u, b, start, channel, count)
                read(at, step, 0, size, dt, b, start, channel, count)
                read(at, Bt, 0, size, B, b, start, 0, n)
                read(at, Ct, 0, size, C, b, start, 0, n)
                if dt_softplus:
                    for j in range(size):
                        for c in range(lanes):
                            step[j, c] = softplus(step[j, c] + bias[0, c])
                else:
                    for j in range(size):
                        for c in range(lanes):
                            step[j, c] += bias[0, c]
                for j in range(size):
                    if marks and mark[b, start + j] == PADDING:
                        continue
                    if marks and mark[b, start + j] == BEGIN:
                        clear(h, 0, n)
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                        out[j, c] = skip[0, c] * x[j, c]
                    for s in range(n):
                        for c in range(lanes):
                            h[s, c] = next_state(h[s, c], step[j, c], decay[s, c], drive[c], Bt[j, s])
                            out[j, c] = fma(Ct[j, s], h[s, c], out[j, c])
                if z[0]:
                    read(at, gate, 0, size, z, b, start, channel, count)
                    for j in range(size):
                        for c in range(lanes):
                            out[j, c] = gated(out[j, c], gate[j, c])
                if marks:
                    for j in range(size):
                        if mark[b, start + j] == PADDING:
                            clear(out, j, j + 1)
                write(at, out, 0, size, y, b, start, channel, count)
            store_tile(final_state + state, width, channel, count, h)

    @kernel
    @named(lanes)
    def scan_backward(
        first: int,
        last: int,
        at: Streams,
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
        """All gradients; those summed over time and channels stay apart: by row dA, dD, ddt_bias, by tile dB, dC."""
        batch, length, width, n = shape
        tiles, chunks = (width + lanes - 1) // lanes, (length + CHUNK - 1) // CHUNK
        mark = bytes_at(marks, (batch, length))
        checkpoints = floats(kept, (batch, tiles, chunks, n, lanes))
        dB_parts, dC_parts = floats(dB, (tiles, batch, length, n)), floats(dC, (tiles, batch, length, n))
        rows = min(CHUNK, length)
        # The chunk recomputed: the state before each position (and after the last), and its decay.
        h, a = np.empty((rows + 1, n, lanes), np.float32), np.empty((rows, n, lanes), np.float32)
        blocks = np.zeros((8, rows, lanes), np.float32)
        x, step, slope, out = blocks[0], blocks[1], blocks[2], blocks[3]
        gate, g, dx, dstep = blocks[4], blocks[5], blocks[6], blocks[7]
        Bt, Ct = np.empty((rows, n), np.float32), np.empty((rows, n), np.float32)
        columns = np.empty((3, n, lanes), np.float32)
        decay, dh, ddecay = columns[0], columns[1], columns[2]
        vectors = np.empty((4, 1, lanes), np.float32)
        skip, bias, dskip, dbias = vectors[0], vectors[1], vectors[2], vectors[3]
        drive = np.empty(lanes, np.float32)
        nothing = np.zeros((n, lanes), np.float32)  # the state before a sequence
        for task in range(first, last):
            b, tile = task // tiles, task % tiles
            channel, count = tile * lanes, min(lanes, width - tile * lanes)
            if count < lanes:
                for block in range(8):  # so that idle lanes add nothing to sums over channels
                    clear(blocks[block], 0, rows)
            load_columns(decay, A, channel, count)
            for s in range(n):
                for c in range(lanes):
                    decay[s, c] *= LOG2E
            load_columns(skip, D, channel, count)
            load_columns(bias, dt_bias, channel, count)
            state = 4 * n * width * b
            load_tile(dh, dfinal_state + state if dfinal_state else 0, width, channel, count)
            clear(ddecay, 0, n)
            clear(dskip, 0, 1)
            clear(dbias, 0, 1)
            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                size = min(CHUNK, length - start)
                for s in range(n):
                    for c in range(lanes):
                        h[0, s, c] = checkpoints[b, tile, chunk, s, c]
                read(at, x, 0, size, u, b, start, channel, count)
                read(at, step, 0, size, dt, b, start, channel, count)
                read(at, Bt, 0, size, B, b, start, 0, n)
                read(at, Ct, 0, size, C, b, start, 0, n)
                _steps(step[:size], slope, bias[0], dt_softplus)
                for j in range(size):
                    if marks and mark[b, start + j] == PADDING:
                        for s in range(n):
                            for c in range(lanes):
                                h[j + 1, s, c] = h[j, s, c]
                        continue
                    begins = marks and mark[b, start + j] == BEGIN
                    keep = _ZERO if begins else _ONE
                    before = nothing if begins else h[j]
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                        out[j, c] = skip[0, c] * x[j, c]
                    for s in range(n):
                        for c in range(lanes):
                            a[j, s, c] = keep * exp2(step[j, c] * decay[s, c])
                            h[j + 1, s, c] = a[j, s, c] * before[s, c] + drive[c] * Bt[j, s]
                            out[j, c] += Ct[j, s] * h[j + 1, s, c]
                read(at, g, 0, size, dy, b, start, channel, count)
                if z[0]:
                    read(at, gate, 0, size, z, b, start, channel, count)
                    for j in range(size):
                        for c in range(lanes):
                            open_ = sigmoid(gate[j, c])
                            dx[j, c] = g[j, c] * out[j, c] * open_ * (_ONE + gate[j, c] * (_ONE - open_))
                            g[j, c] *= gate[j, c] * open_
                    if marks:
                        for j in range(size):
                            if mark[b, start + j] == PADDING:
                                clear(dx, j, j + 1)
                    write(at, dx, 0, size, dz, b, start, channel, count)
                for j in range(size - 1, -1, -1):
                    clear(dx, j, j + 1)
                    clear(dstep, j, j + 1)
                    if marks and mark[b, start + j] == PADDING:
                        for s in range(n):
                            dB_parts[tile, b, start + j, s] = dC_parts[tile, b, start + j, s] = _ZERO
                        continue
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                    begins = marks and mark[b, start + j] == BEGIN
                    before = nothing if begins else h[j]
                    for s in range(n):
                        dBt = dCt = _ZERO
                        for c in range(lanes):
                            dhc = dh[s, c] + g[j, c] * Ct[j, s]
                            dCt += g[j, c] * h[j + 1, s, c]
                            dBt += dhc * drive[c]
                            dx[j, c] += dhc * Bt[j, s]
                            dhc *= a[j, s, c]
                            dh[s, c] = dhc
                            through = dhc * before[s, c]
                            ddecay[s, c] += through * step[j, c]
                            dstep[j, c] += through * decay[s, c]
                        dB_parts[tile, b, start + j, s] = dBt
                        dC_parts[tile, b, start + j, s] = dCt
                    if begins:  # nothing goes back to what came before, be it not a number
                        clear(dh, 0, n)
                    for c in range(lanes):
                        dskip[0, c] += g[j, c] * x[j, c]
                        dstep[j, c] = (LN2 * dstep[j, c] + dx[j, c] * x[j, c]) * slope[j, c]
                        dbias[0, c] += dstep[j, c]
                        dx[j, c] = dx[j, c] * step[j, c] + skip[0, c] * g[j, c]
                write(at, dx, 0, size, du, b, start, channel, count)
                write(at, dstep, 0, size, ddt, b, start, channel, count)
            store_columns(dA, b * width + channel, count, ddecay)
            store_columns(dD, b * width + channel, count, dskip)
            store_columns(ddt_bias, b * width + channel, count, dbias)
            store_tile(dinitial_state + state, width, channel, count, dh)

    return Kernels(scan, scan_backward)
