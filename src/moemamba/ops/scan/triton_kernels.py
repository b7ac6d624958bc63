# mypy: ignore-errors
"""Triton kernels of the selective scan; those of the backward pass are in `triton_backward.py`.

A program owns a tile of I channels with all their states, as (I, N) tiles in registers, and walks through time K
positions at a go, the loads of later positions under way while it computes. Triton lays a tile out as it is loaded.
Here every thread must hold all N states of a channel, so that sums over states need no other thread: `unit` is the
stride of the channel dimension, one, hidden in a variable so that Triton sees no contiguous dimension and lays channels
across the threads of the one warp.

`marks` (b, l) int8 says what a position is: PLAIN, BEGIN (the state is reset before it) or PADDING (nothing happens).
Time is cut into chunks. `starts` (b, chunks, ...) holds the state that each chunk begins with. Where batch and channels
do not fill the GPU, each program walks one chunk only (CHUNKED) and `starts` is computed beforehand: what a chunk does
to any state is a decay, `exp(A sum(dt))`, and an addition (`summarise_forward_kernel`), which `carry_kernel` applies
chunk after chunk. The same goes for the adjoint state in the backward pass, the other way round in time.
"""

import triton
import triton.language as tl

from ..kit.triton import BEGIN, LOG2E, PADDING, PLAIN, sigmoid, wide_index

GROUP = tl.constexpr(16)  # channels whose states lie side by side in saved states
WIDEST = tl.constexpr(64)  # channels that saved states are padded to a multiple of: the widest tile


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|), the logarithm as e P(e): Chebyshev fit on [0, 1], relative error below 4e-7."""
    e = tl.exp2(-LOG2E * tl.abs(x))
    p = -0.008574675768613815
    p = p * e + 0.044214192777872086
    p = p * e - 0.10785368084907532
    p = p * e + 0.17757023870944977
    p = p * e - 0.2449961155653
    p = p * e + 0.3327617645263672
    p = p * e - 0.49997448921203613
    p = p * e + 0.9999998211860657
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _place(length, width, chunk, CHUNKED: tl.constexpr, I: tl.constexpr):
    """This program's tile of channels, first chunk, chunk after the last and row; then numbers of chunks and tiles."""
    tiles = tl.cdiv(width, I)
    chunks = tl.cdiv(length, chunk)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    if CHUNKED:
        return tile, part % chunks, part % chunks + 1, wide_index(part // chunks), chunks, tiles
    return tile, 0, chunks, wide_index(part), chunks, tiles


@triton.jit
def _row(pointer, stride, t, stop, offsets, inside):
    """The row of position t as it is in memory, zeros from `stop` on."""
    return tl.load(pointer + wide_index(t) * stride + offsets, mask=inside & (t < stop), other=0.0)


@triton.jit
def _rows(pointer, stride, start, stop, offsets, inside, K: tl.constexpr):
    """K rows from position `start`."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (_row(pointer, stride, start + k, stop, offsets, inside),)
    return rows


@triton.jit
def _marks(marks, start, stop, K: tl.constexpr):
    """What K positions from `start` are; PADDING from `stop` on."""
    found = ()
    for k in tl.static_range(K):
        if marks is None:
            found = found + (tl.where(start + k < stop, PLAIN, PADDING),)
        else:
            found = found + (tl.load(marks + start + k, mask=start + k < stop, other=PADDING).to(tl.int32),)
    return found


@triton.jit
def _step(dt, bias, mark, SOFTPLUS: tl.constexpr):
    """Step size of a position; zero at padding, so that the state stays as it is."""
    step = dt.to(tl.float32) + bias
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(mark == PADDING, 0.0, step)


@triton.jit
def _weights(row, mark, PACKED: tl.constexpr):
    """B or C of a position; zero at padding, be they not a number there."""
    row = row.to(tl.float32)
    if PACKED:
        row = tl.where(mark == PADDING, 0.0, row)
    return row[None, :]


@triton.jit
def _input(u, mark):
    return tl.where(mark == PADDING, 0.0, u.to(tl.float32))


@triton.jit
def _decay(step, a2):
    """exp(dt A), with a2 = A log2(e)."""
    return tl.exp2(step[:, None] * a2)


@triton.jit
def _through(x, mark, PACKED: tl.constexpr):
    """What passes between a position and the one before it: nothing, be it not a number, where a sequence begins."""
    if PACKED:
        x = tl.where(mark == BEGIN, 0.0, x)
    return x


@triton.jit
def _state_tile(pointer, row, width, n_state, channel, n, unit):
    """Addresses and mask of an (I, N) tile in row of (rows, i, n)."""
    offsets = channel[:, None] * n_state + n[None, :] * unit
    return pointer + row * width * n_state + offsets, (channel < width)[:, None] & (n < n_state)[None, :]


@triton.jit
def _load_state(pointer, row, width, n_state, channel, n, unit):
    """A tile of (rows, i, n) in float32; zeros where there is none to load."""
    if pointer is None:
        states = tl.zeros((channel.shape[0], n.shape[0]), tl.float32)
    else:
        where, inside = _state_tile(pointer, row, width, n_state, channel, n, unit)
        states = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    return states


@triton.jit
def _saved(pointer, row, padded, tile, unit, I: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Addresses of a tile's first M states in row of (rows, padded / GROUP, N, GROUP): only constants between them."""
    i, n = tl.arange(0, I)[:, None], tl.arange(0, M)[None, :]
    cells = (i // GROUP * (N * GROUP) + i % GROUP) * unit + n * GROUP
    return pointer + (wide_index(row) * padded + tile * I) * N + cells


@triton.jit
def _vector(pointer, channel, width, unit):
    """One number a channel in float32; zeros if there are none."""
    if pointer is None:
        numbers = tl.zeros((channel.shape[0],), tl.float32)
    else:
        numbers = tl.load(pointer + channel * unit, mask=channel < width, other=0.0).to(tl.float32)
    return numbers


@triton.jit(do_not_specialize=["unit"])
def forward_kernel(
    u, dt, A, B, C, D, z, bias, marks, initial, starts, y, final,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, length, width, n_state, chunk, unit,
    CHUNKED: tl.constexpr, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr,
    I: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y, and either the final state (one program a row) or nothing but y (CHUNKED, from `starts`)."""
    tile, first, last, batch, chunks, _ = _place(length, width, chunk, CHUNKED, I)
    padded = tl.cdiv(width, WIDEST) * WIDEST
    channel = tile * I + tl.arange(0, I)
    inside = channel < width
    offsets = channel * unit
    n = tl.arange(0, N)
    a2 = _load_state(A, 0, width, n_state, channel, n, unit) * LOG2E
    step_bias, skip = _vector(bias, channel, width, unit), _vector(D, channel, width, unit)
    u, dt, B, C, y = u + batch * u_b, dt + batch * dt_b, B + batch * B_b, C + batch * C_b, y + batch * length * width
    if z is not None:
        z += batch * z_b
    if marks is not None:
        marks += batch * length
    if CHUNKED:
        h = tl.load(_saved(starts, batch * chunks + first, padded, tile, unit, I, N, N))
    else:
        h = _load_state(initial, batch, width, n_state, channel, n, unit)
    for c in range(first, last):
        if SAVE:
            tl.store(_saved(starts, batch * chunks + c, padded, tile, unit, I, N, N), h)
        stop = tl.minimum((c + 1) * chunk, length)
        us, dts = (
            _rows(u, u_t, c * chunk, stop, offsets, inside, K),
            _rows(dt, dt_t, c * chunk, stop, offsets, inside, K),
        )
        Bs, Cs = _rows(B, B_t, c * chunk, stop, n, n < n_state, K), _rows(C, C_t, c * chunk, stop, n, n < n_state, K)
        zs = us
        if z is not None:
            zs = _rows(z, z_t, c * chunk, stop, offsets, inside, K)
        for t in range(c * chunk, stop, K):
            mark = _marks(marks, t, stop, K)
            next_us, next_dts, next_Bs, next_Cs, next_zs = (), (), (), (), ()
            for k in tl.static_range(K):
                step, x = _step(dts[k], step_bias, mark[k], SOFTPLUS), _input(us[k], mark[k])
                drive = (step * x)[:, None] * _weights(Bs[k], mark[k], marks is not None)
                h = _through(_decay(step, a2) * h, mark[k], marks is not None) + drive
                out = tl.sum(h * Cs[k].to(tl.float32)[None, :], axis=1) + skip * x
                if z is not None:
                    gate = zs[k].to(tl.float32)
                    out = out * gate * sigmoid(gate)
                out = tl.where(mark[k] == PADDING, 0.0, out).to(y.dtype.element_ty)
                tl.store(y + wide_index(t + k) * width + offsets, out, mask=inside & (t + k < stop))
                next_us = next_us + (_row(u, u_t, t + K + k, stop, offsets, inside),)
                next_dts = next_dts + (_row(dt, dt_t, t + K + k, stop, offsets, inside),)
                next_Bs = next_Bs + (_row(B, B_t, t + K + k, stop, n, n < n_state),)
                next_Cs = next_Cs + (_row(C, C_t, t + K + k, stop, n, n < n_state),)
                if z is not None:
                    next_zs = next_zs + (_row(z, z_t, t + K + k, stop, offsets, inside),)
                else:
                    next_zs = next_us
            us, dts, Bs, Cs, zs = next_us, next_dts, next_Bs, next_Cs, next_zs
    if not CHUNKED:
        where, mask = _state_tile(final, batch, width, n_state, channel, n, unit)
        tl.store(where, h, mask=mask)


@triton.jit(do_not_specialize=["unit"])
def summarise_forward_kernel(
    u, dt, A, B, bias, marks, sums, totals, u_b, u_t, dt_b, dt_t, B_b, B_t, length, width, n_state, chunk, unit,
    SOFTPLUS: tl.constexpr, I: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The state each chunk leaves behind when it begins with zero, and the sum of its steps (infinite if it resets)."""
    tile, c, _, batch, chunks, _ = _place(length, width, chunk, True, I)
    padded = tl.cdiv(width, WIDEST) * WIDEST
    channel = tile * I + tl.arange(0, I)
    inside = channel < width
    offsets = channel * unit
    n = tl.arange(0, N)
    a2 = _load_state(A, 0, width, n_state, channel, n, unit) * LOG2E
    step_bias = _vector(bias, channel, width, unit)
    u, dt, B = u + batch * u_b, dt + batch * dt_b, B + batch * B_b
    if marks is not None:
        marks += batch * length
    h = tl.zeros((I, N), tl.float32)
    total = tl.zeros((I,), tl.float32)
    stop = tl.minimum((c + 1) * chunk, length)
    us, dts = _rows(u, u_t, c * chunk, stop, offsets, inside, K), _rows(dt, dt_t, c * chunk, stop, offsets, inside, K)
    Bs = _rows(B, B_t, c * chunk, stop, n, n < n_state, K)
    for t in range(c * chunk, stop, K):
        mark = _marks(marks, t, stop, K)
        next_us, next_dts, next_Bs = (), (), ()
        for k in tl.static_range(K):
            step, x = _step(dts[k], step_bias, mark[k], SOFTPLUS), _input(us[k], mark[k])
            drive = (step * x)[:, None] * _weights(Bs[k], mark[k], marks is not None)
            h = _through(_decay(step, a2) * h, mark[k], marks is not None) + drive
            total = tl.where(mark[k] == BEGIN, float("inf"), total + step)
            next_us = next_us + (_row(u, u_t, t + K + k, stop, offsets, inside),)
            next_dts = next_dts + (_row(dt, dt_t, t + K + k, stop, offsets, inside),)
            next_Bs = next_Bs + (_row(B, B_t, t + K + k, stop, n, n < n_state),)
        us, dts, Bs = next_us, next_dts, next_Bs
    tl.store(_saved(sums, batch * chunks + c, padded, tile, unit, I, N, N), h)
    tl.store(totals + (batch * chunks + c) * width + offsets, total, mask=inside)


@triton.jit
def carry_kernel(
    A, sums, totals, first, last, chunks, width, n_state,
    REVERSED: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Walk a state over the chunks of a row: in `sums` (b, chunks, ...), replace what a chunk adds by what it meets.

    The walk begins with `first` (b, i, n) and what comes out at its end goes to `last` (b, i, n).
    """
    size = tl.cdiv(width, WIDEST) * WIDEST * N
    blocks = tl.cdiv(size, BLOCK)
    batch = wide_index(tl.program_id(0) // blocks)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    channel, n = cell // (N * GROUP) * GROUP + cell % GROUP, cell // GROUP % N
    inside = (cell < size) & (channel < width) & (n < n_state)
    natural = channel * n_state + n
    a2 = tl.load(A + natural, mask=inside, other=0.0) * LOG2E
    carry = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        carry = tl.load(first + batch * width * n_state + natural, mask=inside, other=0.0).to(tl.float32)
    sums, totals = sums + batch * chunks * size, totals + batch * chunks * width
    for start in range(0, chunks, K):
        added, steps = (), ()
        for k in tl.static_range(K):  # loads that wait for nothing, all under way before the first is needed
            c = wide_index(chunks - 1 - start - k if REVERSED else start + k)
            mask = inside & (start + k < chunks)
            added = added + (tl.load(sums + c * size + cell, mask=mask, other=0.0),)
            steps = steps + (tl.load(totals + c * width + channel, mask=mask, other=0.0),)
        for k in tl.static_range(K):
            c = wide_index(chunks - 1 - start - k if REVERSED else start + k)
            tl.store(sums + c * size + cell, carry, mask=(cell < size) & (start + k < chunks))
            carry = tl.where(steps[k] == float("inf"), 0.0, tl.exp2(steps[k] * a2) * carry) + added[k]
    tl.store(last + batch * width * n_state + natural, carry, mask=inside)
