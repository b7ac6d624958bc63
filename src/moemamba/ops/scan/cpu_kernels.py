"""The two kernels of `cpu.py`. A task is a tile of channels of one row, walked through in chunks of time.

A chunk's inputs are fetched together, since a single position's work is too short to hide the memory behind, into
(CHUNK, lanes) blocks; its states stay in the first cache. Lanes beyond a last tile's channels hold zeros or whatever
zeros lead to, and are never written out.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from ..kit.cpu import (
    LN2,
    LOG2E,
    TILE,
    Rows,
    Streams,
    bytes_at,
    exact_kernel,
    exp2,
    floats,
    fma,
    gated,
    kernel,
    load,
    named,
    next_state,
    read,
    sigmoid,
    softplus,
    store,
    write,
)
from ..packing import BEGIN, PADDING

CHUNK = 32  # positions between two states that the forward pass keeps

_ZERO, _ONE = np.float32(0), np.float32(1)


class Kernels(NamedTuple):
    """Those of one width of tiles."""

    scan: Callable[..., None]
    backward: Callable[..., None]


def lanes(width: int) -> int:
    """Channels of a task: even shares of a layer's, as whole vector registers, TILE at most (96 are two times 48)."""
    share = -(-width // max(1, -(-width // TILE)))
    return max(32, -(-share // 16) * 16)


def space(lanes: int, length: int, n: int, backward: bool) -> int:
    """Numbers that a kernel keeps on the way."""
    rows = min(CHUNK, length)
    if backward:
        return (8 * rows + (2 * rows + 5) * n + 5) * lanes + 2 * rows * n
    return (4 * rows + 2 * n + 3) * lanes + 2 * rows * n


@cache
def kernels(lanes: int) -> Kernels:
    """The kernels for tiles of so many channels, a constant in them: a loop of unknown length would be half as fast."""

    @exact_kernel
    @named(lanes)
    def scan(
        first: int,
        last: int,
        spare: int,
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
        rows = min(CHUNK, length)
        block, line = 4 * rows * lanes, 4 * lanes
        x, step = floats(spare, (rows, lanes)), floats(spare + block, (rows, lanes))
        out, gate = floats(spare + 2 * block, (rows, lanes)), floats(spare + 3 * block, (rows, lanes))
        rest = spare + 4 * block
        h, decay = floats(rest, (n, lanes)), floats(rest + n * line, (n, lanes))
        rest += 2 * n * line
        skip, bias, drive = floats(rest, lanes), floats(rest + line, lanes), floats(rest + 2 * line, lanes)
        rest += 3 * line
        Bt, Ct = floats(rest, (rows, n)), floats(rest + 4 * rows * n, (rows, n))
        for task in range(first, last):
            b, tile = task // tiles, task % tiles
            channel, count = tile * lanes, min(lanes, width - tile * lanes)
            if count < lanes:
                load(at, x, lanes, 0, 0, 0, 4 * rows, 0)  # zeros in the four blocks, for the idle lanes
            load(at, decay, lanes, A + 4 * n * channel, 4, 4 * n, n, count)
            for s in range(n):
                for c in range(lanes):
                    decay[s, c] *= LOG2E  # exp(dt A) = 2^(dt decay)
            load(at, skip, lanes, D + 4 * channel if D else 0, 0, 4, 1, count)
            load(at, bias, lanes, dt_bias + 4 * channel if dt_bias else 0, 0, 4, 1, count)
            state = 4 * (n * width * b + channel)
            load(at, h, lanes, initial_state + state if initial_state else 0, 4 * width, 4, n, count)
            for chunk in range(chunks):
                start = chunk * CHUNK
                size = min(CHUNK, length - start)
                if kept:
                    store(at, h, lanes, kept + (task * chunks + chunk) * n * line, line, 4, n, lanes)
                read(at, x, lanes, size, u, b, start, channel, count)
                read(at, step, lanes, size, dt, b, start, channel, count)
                read(at, Bt, n, size, B, b, start, 0, n)
                read(at, Ct, n, size, C, b, start, 0, n)
                for j in range(size):
                    for c in range(lanes):
                        step[j, c] += bias[c]
                    if dt_softplus:
                        for c in range(lanes):
                            step[j, c] = softplus(step[j, c])
                for j in range(size):
                    if marks and mark[b, start + j] == PADDING:
                        continue
                    if marks and mark[b, start + j] == BEGIN:
                        load(at, h, lanes, 0, 0, 0, n, 0)
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                        out[j, c] = skip[c] * x[j, c]
                    for s in range(n):
                        for c in range(lanes):
                            h[s, c] = next_state(h[s, c], step[j, c], decay[s, c], drive[c], Bt[j, s])
                            out[j, c] = fma(Ct[j, s], h[s, c], out[j, c])
                if z[0]:
                    read(at, gate, lanes, size, z, b, start, channel, count)
                    for j in range(size):
                        for c in range(lanes):
                            out[j, c] = gated(out[j, c], gate[j, c])
                if marks:
                    for j in range(size):
                        if mark[b, start + j] == PADDING:
                            for c in range(lanes):
                                out[j, c] = _ZERO
                write(at, out, lanes, size, y, b, start, channel, count)
            store(at, h, lanes, final_state + state, 4 * width, 4, n, count)

    @kernel
    @named(lanes)
    def scan_backward(
        first: int,
        last: int,
        spare: int,
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
        dB_parts, dC_parts = floats(dB, (tiles, batch, length, n)), floats(dC, (tiles, batch, length, n))
        rows = min(CHUNK, length)
        block, line = 4 * rows * lanes, 4 * lanes
        x, step = floats(spare, (rows, lanes)), floats(spare + block, (rows, lanes))
        slope, out = floats(spare + 2 * block, (rows, lanes)), floats(spare + 3 * block, (rows, lanes))
        gate, g = floats(spare + 4 * block, (rows, lanes)), floats(spare + 5 * block, (rows, lanes))
        dx, dstep = floats(spare + 6 * block, (rows, lanes)), floats(spare + 7 * block, (rows, lanes))
        # The chunk recomputed: the decay at each position, and the state before it, after the last, and of nothing.
        a, states = floats(spare + 8 * block, (rows, n, lanes)), spare + (8 + n) * block
        h, nothing = floats(states, (rows + 2, n, lanes)), rows + 1
        rest = states + (rows + 2) * n * line
        decay, dh = floats(rest, (n, lanes)), floats(rest + n * line, (n, lanes))
        ddecay = floats(rest + 2 * n * line, (n, lanes))
        rest += 3 * n * line
        skip, bias, drive = floats(rest, lanes), floats(rest + line, lanes), floats(rest + 2 * line, lanes)
        dskip, dbias = floats(rest + 3 * line, lanes), floats(rest + 4 * line, lanes)
        rest += 5 * line
        Bt, Ct = floats(rest, (rows, n)), floats(rest + 4 * rows * n, (rows, n))
        load(at, states + nothing * n * line, lanes, 0, 0, 0, n, 0)
        for task in range(first, last):
            b, tile = task // tiles, task % tiles
            channel, count = tile * lanes, min(lanes, width - tile * lanes)
            if count < lanes:
                load(at, x, lanes, 0, 0, 0, 8 * rows, 0)  # so that idle lanes add nothing to sums over channels
            load(at, decay, lanes, A + 4 * n * channel, 4, 4 * n, n, count)
            for s in range(n):
                for c in range(lanes):
                    decay[s, c] *= LOG2E
            load(at, skip, lanes, D + 4 * channel if D else 0, 0, 4, 1, count)
            load(at, bias, lanes, dt_bias + 4 * channel if dt_bias else 0, 0, 4, 1, count)
            state = 4 * (n * width * b + channel)
            load(at, dh, lanes, dfinal_state + state if dfinal_state else 0, 4 * width, 4, n, count)
            load(at, ddecay, lanes, 0, 0, 0, n, 0)
            load(at, dskip, lanes, 0, 0, 0, 2, 0)  # and dbias
            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                size = min(CHUNK, length - start)
                load(at, states, lanes, kept + (task * chunks + chunk) * n * line, line, 4, n, lanes)
                read(at, x, lanes, size, u, b, start, channel, count)
                read(at, step, lanes, size, dt, b, start, channel, count)
                read(at, Bt, n, size, B, b, start, 0, n)
                read(at, Ct, n, size, C, b, start, 0, n)
                for j in range(size):
                    for c in range(lanes):
                        raw = step[j, c] + bias[c]
                        step[j, c] = softplus(raw) if dt_softplus else raw
                        slope[j, c] = sigmoid(raw) if dt_softplus else _ONE
                for j in range(size):
                    if marks and mark[b, start + j] == PADDING:
                        load(at, states + (j + 1) * n * line, lanes, states + j * n * line, line, 4, n, lanes)
                        continue
                    begins = marks and mark[b, start + j] == BEGIN
                    before, keep = nothing if begins else j, _ZERO if begins else _ONE
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                        out[j, c] = skip[c] * x[j, c]
                    for s in range(n):
                        for c in range(lanes):
                            a[j, s, c] = keep * exp2(step[j, c] * decay[s, c])
                            h[j + 1, s, c] = a[j, s, c] * h[before, s, c] + drive[c] * Bt[j, s]
                            out[j, c] += Ct[j, s] * h[j + 1, s, c]
                read(at, g, lanes, size, dy, b, start, channel, count)
                if z[0]:
                    read(at, gate, lanes, size, z, b, start, channel, count)
                    for j in range(size):
                        for c in range(lanes):
                            open_ = sigmoid(gate[j, c])
                            dx[j, c] = g[j, c] * out[j, c] * open_ * (_ONE + gate[j, c] * (_ONE - open_))
                            g[j, c] *= gate[j, c] * open_
                        if marks and mark[b, start + j] == PADDING:
                            for c in range(lanes):
                                dx[j, c] = _ZERO
                    write(at, dx, lanes, size, dz, b, start, channel, count)
                load(at, dx, lanes, 0, 0, 0, 2 * rows, 0)  # and dstep
                for j in range(size - 1, -1, -1):
                    if marks and mark[b, start + j] == PADDING:
                        for s in range(n):
                            dB_parts[tile, b, start + j, s] = dC_parts[tile, b, start + j, s] = _ZERO
                        continue
                    for c in range(lanes):
                        drive[c] = step[j, c] * x[j, c]
                    begins = marks and mark[b, start + j] == BEGIN
                    before = nothing if begins else j
                    for s in range(n):
                        dBt = dCt = _ZERO
                        for c in range(lanes):
                            dhc = dh[s, c] + g[j, c] * Ct[j, s]
                            dCt += g[j, c] * h[j + 1, s, c]
                            dBt += dhc * drive[c]
                            dx[j, c] += dhc * Bt[j, s]
                            dhc *= a[j, s, c]
                            dh[s, c] = dhc
                            through = dhc * h[before, s, c]
                            ddecay[s, c] += through * step[j, c]
                            dstep[j, c] += through * decay[s, c]
                        dB_parts[tile, b, start + j, s] = dBt
                        dC_parts[tile, b, start + j, s] = dCt
                    if begins:  # nothing goes back to what came before, be it not a number
                        load(at, dh, lanes, 0, 0, 0, n, 0)
                    for c in range(lanes):
                        dskip[c] += g[j, c] * x[j, c]
                        dstep[j, c] = (LN2 * dstep[j, c] + dx[j, c] * x[j, c]) * slope[j, c]
                        dbias[c] += dstep[j, c]
                        dx[j, c] = dx[j, c] * step[j, c] + skip[c] * g[j, c]
                write(at, dx, lanes, size, du, b, start, channel, count)
                write(at, dstep, lanes, size, ddt, b, start, channel, count)
            place = 4 * (b * width + channel)
            store(at, ddecay, lanes, dA + n * place, 4, 4 * n, n, count)
            store(at, dskip, lanes, dD + place, 0, 4, 1, count)
            store(at, dbias, lanes, ddt_bias + place, 0, 4, 1, count)
            store(at, dh, lanes, dinitial_state + state, 4 * width, 4, n, count)

    return Kernels(scan, scan_backward)
