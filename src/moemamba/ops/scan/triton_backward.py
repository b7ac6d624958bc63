# mypy: ignore-errors
"""Triton kernels of the selective scan's backward pass; `triton_kernels.py` says how tiles and chunks lie."""

import triton
import triton.language as tl

from ..kit.triton import BEGIN, LN2, LOG2E, PADDING, sigmoid, wide_index
from .triton_kernels import (
    GROUP,
    WIDEST,
    _decay,
    _input,
    _load_state,
    _marks,
    _place,
    _row,
    _rows,
    _saved,
    _state_tile,
    _step,
    _through,
    _vector,
    _weights,
)


@triton.jit(do_not_specialize=["unit"])
def summarise_backward_kernel(
    dy, dt, A, C, z, bias, marks, sums, totals,
    dt_b, dt_t, C_b, C_t, z_b, z_t, length, width, n_state, chunk, unit,
    SOFTPLUS: tl.constexpr, I: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The adjoint state each chunk hands to the one before it when none comes from after it, and its sum of steps."""
    tile, c, _, batch, chunks, _ = _place(length, width, chunk, True, I)
    padded = tl.cdiv(width, WIDEST) * WIDEST
    channel = tile * I + tl.arange(0, I)
    inside = channel < width
    offsets = channel * unit
    n = tl.arange(0, N)
    a2 = _load_state(A, 0, width, n_state, channel, n, unit) * LOG2E
    step_bias = _vector(bias, channel, width, unit)
    dy, dt, C = dy + batch * length * width, dt + batch * dt_b, C + batch * C_b
    if z is not None:
        z += batch * z_b
    if marks is not None:
        marks += batch * length
    g = tl.zeros((I, N), tl.float32)
    total = tl.zeros((I,), tl.float32)
    stop = tl.minimum((c + 1) * chunk, length)
    groups = tl.cdiv(stop - c * chunk, K)
    t = c * chunk + (groups - 1) * K
    dts, dys = _rows(dt, dt_t, t, stop, offsets, inside, K), _rows(dy, width, t, stop, offsets, inside, K)
    Cs = _rows(C, C_t, t, stop, n, n < n_state, K)
    zs = dys
    if z is not None:
        zs = _rows(z, z_t, t, stop, offsets, inside, K)
    for group in range(groups):
        t = c * chunk + (groups - 1 - group) * K
        before = tl.maximum(t - K, 0)
        mark = _marks(marks, t, stop, K)
        next_dts, next_dys, next_Cs, next_zs = (), (), (), ()
        for k in tl.static_range(K - 1, -1, -1):
            step, dout = _step(dts[k], step_bias, mark[k], SOFTPLUS), _input(dys[k], mark[k])
            if z is not None:
                gate = zs[k].to(tl.float32)
                dout = tl.where(mark[k] == PADDING, 0.0, dout * gate * sigmoid(gate))
            g += dout[:, None] * _weights(Cs[k], mark[k], marks is not None)
            g = _through(_decay(step, a2) * g, mark[k], marks is not None)
            total = tl.where(mark[k] == BEGIN, float("inf"), total + step)
            next_dts = (_row(dt, dt_t, before + k, stop, offsets, inside),) + next_dts
            next_dys = (_row(dy, width, before + k, stop, offsets, inside),) + next_dys
            next_Cs = (_row(C, C_t, before + k, stop, n, n < n_state),) + next_Cs
            if z is not None:
                next_zs = (_row(z, z_t, before + k, stop, offsets, inside),) + next_zs
            else:
                next_zs = next_dys
        dts, dys, Cs, zs = next_dts, next_dys, next_Cs, next_zs
    tl.store(_saved(sums, batch * chunks + c, padded, tile, unit, I, N, N), g)
    tl.store(totals + (batch * chunks + c) * width + offsets, total, mask=inside)


@triton.jit
def _blocks(replay, group, unit, I: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """The states at the beginning of a group, M at a time."""
    blocks = ()
    for j in tl.static_range(N // M):
        blocks = blocks + (tl.load(_saved(replay + j * (M * GROUP), group, I, 0, unit, I, N, M)),)
    return blocks


@triton.jit
def _plus(left, right, K: tl.constexpr):
    total = ()
    for k in tl.static_range(K):
        total = total + (left[k] + right[k],)
    return total


@triton.jit(do_not_specialize=["unit"])
def backward_kernel(
    dy, u, dt, A, B, C, D, z, bias, marks, starts, dfinal, scratch,
    du, ddt, dz, dA, dBC, dD, dbias, dinitial,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, batches, length, width, n_state, chunk, unit,
    CHUNKED: tl.constexpr, SOFTPLUS: tl.constexpr,
    I: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient, chunk by chunk from the last: first the states at each group of K positions go to `scratch`, then
    the groups are walked backwards, their states computed again in registers, M states of a channel at a time.

    `dfinal` is the adjoint of the final state (b, i, n), or of each chunk's last state if CHUNKED, laid out like
    `starts`. dA (parts, ...), dD and dbias (parts, i) are sums over this program's positions, dBC (2, tiles, b, l, n)
    over its channels: the matrix unit adds up products of two positions at a time, each in a column of its own.
    """
    tile, first, last, batch, chunks, tiles = _place(length, width, chunk, CHUNKED, I)
    J: tl.constexpr = N // M
    padded = tl.cdiv(width, WIDEST) * WIDEST
    channel = tile * I + tl.arange(0, I)
    inside = channel < width
    offsets = channel * unit
    n = tl.arange(0, M)
    step_bias, skip = _vector(bias, channel, width, unit), _vector(D, channel, width, unit)
    part = tl.program_id(0) // tiles
    plane = batch * length * width
    dy, u, dt, B, C = dy + plane, u + batch * u_b, dt + batch * dt_b, B + batch * B_b, C + batch * C_b
    du, ddt = du + plane, ddt + plane
    if z is not None:
        z, dz = z + batch * z_b, dz + plane
    if marks is not None:
        marks += batch * length
    dB = dBC + (wide_index(tile) * batches + batch) * length * n_state
    replay = scratch + wide_index(tl.program_id(0)) * tl.cdiv(chunk, K) * (N * I)
    dskip = tl.zeros((I,), tl.float32)
    dstep_bias = tl.zeros((I,), tl.float32)
    a2, g, da = (), (), ()
    for j in tl.static_range(J):
        a2 = a2 + (_load_state(A, 0, width, n_state, channel, j * M + n, unit) * LOG2E,)
        if CHUNKED:
            g = g + (tl.load(_saved(dfinal + j * (M * GROUP), batch * chunks + first, padded, tile, unit, I, N, M)),)
        else:
            g = g + (_load_state(dfinal, batch, width, n_state, channel, j * M + n, unit),)
        da = da + (tl.zeros((I, M), tl.float32),)
    for back in range(last - first):
        c = last - 1 - back
        stop = tl.minimum((c + 1) * chunk, length)
        groups = tl.cdiv(stop - c * chunk, K)
        every_n = tl.arange(0, N)
        every_a2 = _load_state(A, 0, width, n_state, channel, every_n, unit) * LOG2E
        h = tl.load(_saved(starts, batch * chunks + c, padded, tile, unit, I, N, N))
        us, dts = (
            _rows(u, u_t, c * chunk, stop, offsets, inside, K),
            _rows(dt, dt_t, c * chunk, stop, offsets, inside, K),
        )
        every_B = _rows(B, B_t, c * chunk, stop, every_n, every_n < n_state, K)
        for group in range(groups):
            t = c * chunk + group * K
            tl.store(_saved(replay, group, I, 0, unit, I, N, N), h)
            mark = _marks(marks, t, stop, K)
            next_us = _rows(u, u_t, t + K, stop, offsets, inside, K)
            next_dts = _rows(dt, dt_t, t + K, stop, offsets, inside, K)
            next_every_B = _rows(B, B_t, t + K, stop, every_n, every_n < n_state, K)
            for k in tl.static_range(K):
                step = _step(dts[k], step_bias, mark[k], SOFTPLUS)
                drive = (step * _input(us[k], mark[k]))[:, None] * _weights(every_B[k], mark[k], marks is not None)
                h = _through(_decay(step, every_a2) * h, mark[k], marks is not None) + drive
            us, dts, every_B = next_us, next_dts, next_every_B
        t = c * chunk + (groups - 1) * K
        us, dts = _rows(u, u_t, t, stop, offsets, inside, K), _rows(dt, dt_t, t, stop, offsets, inside, K)
        dys = _rows(dy, width, t, stop, offsets, inside, K)
        zs = dys
        if z is not None:
            zs = _rows(z, z_t, t, stop, offsets, inside, K)
        beginnings = _blocks(replay, groups - 1, unit, I, N, M)
        for group in range(groups):
            t = c * chunk + (groups - 1 - group) * K
            before = tl.maximum(t - K, 0)
            mark = _marks(marks, t, stop, K)
            next_us, next_dts = (
                _rows(u, u_t, before, stop, offsets, inside, K),
                _rows(dt, dt_t, before, stop, offsets, inside, K),
            )
            next_dys = _rows(dy, width, before, stop, offsets, inside, K)
            next_zs = next_dys
            if z is not None:
                next_zs = _rows(z, z_t, before, stop, offsets, inside, K)
            next_beginnings = _blocks(replay, tl.maximum(groups - 2 - group, 0), unit, I, N, M)
            xs, steps, douts, outs, ddrives, dsteps = (), (), (), (), (), ()
            for k in tl.static_range(K):
                x, dout = _input(us[k], mark[k]), _input(dys[k], mark[k])
                if z is not None:
                    gate = zs[k].to(tl.float32)
                    dout = tl.where(mark[k] == PADDING, 0.0, dout * gate * sigmoid(gate))
                xs, steps, douts = xs + (x,), steps + (_step(dts[k], step_bias, mark[k], SOFTPLUS),), douts + (dout,)
                outs, ddrives, dsteps = outs + (skip * x,), ddrives + (tl.zeros_like(x),), dsteps + (tl.zeros_like(x),)
            carried, grown = (), ()
            for j in tl.static_range(J):
                Bs = _rows(B, B_t, t, stop, j * M + n, j * M + n < n_state, K)
                Cs = _rows(C, C_t, t, stop, j * M + n, j * M + n < n_state, K)
                state = beginnings[j]
                hs, decays, sums = (state,), (), ()
                for k in tl.static_range(K):
                    decays = decays + (_decay(steps[k], a2[j]),)
                    drive = (steps[k] * xs[k])[:, None] * _weights(Bs[k], mark[k], marks is not None)
                    state = _through(decays[k] * state, mark[k], marks is not None) + drive
                    hs = hs + (state,)
                    sums = sums + (tl.sum(state * Cs[k].to(tl.float32)[None, :], axis=1),)
                outs = _plus(outs, sums, K)
                adjoint, da_j, ddrive, dstep = g[j], da[j], (), ()
                dBCs = tl.zeros((4 * M, T), tl.float32)
                for k in tl.static_range(K - 1, -1, -1):
                    adjoint += douts[k][:, None] * _weights(Cs[k], mark[k], marks is not None)
                    terms = tl.join((steps[k] * xs[k])[:, None] * adjoint, douts[k][:, None] * hs[k + 1])
                    if k % 2 == 1:
                        later = terms
                    else:
                        pick = tl.broadcast_to((tl.arange(0, T) == k // 2)[None, :], (I, T)).to(tl.float32)
                        terms = tl.trans(tl.reshape(tl.join(terms, later), (I, 4 * M)))
                        if marks is None:
                            dBCs = tl.dot(terms, pick, dBCs, input_precision=PRECISION)
                        else:  # positions of other sequences have columns of their own, which no product with zero is
                            picked = tl.dot(terms, pick, input_precision=PRECISION)
                            dBCs = tl.where((tl.arange(0, T) == k // 2)[None, :], picked, dBCs)
                    ddrive = (tl.sum(adjoint * _weights(Bs[k], mark[k], marks is not None), axis=1),) + ddrive
                    adjoint = _through(adjoint * decays[k], mark[k], marks is not None)
                    dexponent = _through(adjoint * hs[k], mark[k], marks is not None)
                    dstep = (tl.sum(dexponent * a2[j], axis=1),) + dstep
                    da_j += dexponent * steps[k][:, None]
                ddrives, dsteps = _plus(ddrives, ddrive, K), _plus(dsteps, dstep, K)
                term = tl.arange(0, 4 * M)[:, None]
                pair = tl.arange(0, T)[None, :]
                states = j * M + term // 4
                time = t + 2 * pair + term % 2
                cell = (
                    wide_index(time) * n_state
                    + states
                    + term // 2 % 2 * (wide_index(tiles) * batches * length * n_state)
                )
                tl.store(dB + cell, dBCs, mask=(states < n_state) & (time < stop) & (pair < K // 2))
                carried, grown = carried + (adjoint,), grown + (da_j,)
            g, da = carried, grown
            for k in tl.static_range(K):
                here = wide_index(t + k) * width + offsets
                live = inside & (t + k < stop)
                dx = douts[k] * skip + steps[k] * ddrives[k]
                dstep = dsteps[k] * LN2 + xs[k] * ddrives[k]
                if SOFTPLUS:
                    dstep *= sigmoid(dts[k].to(tl.float32) + step_bias)
                dstep = tl.where(mark[k] == PADDING, 0.0, dstep)
                dskip += douts[k] * xs[k]
                dstep_bias += dstep
                tl.store(du + here, tl.where(mark[k] == PADDING, 0.0, dx).to(du.dtype.element_ty), mask=live)
                tl.store(ddt + here, dstep.to(ddt.dtype.element_ty), mask=live)
                if z is not None:
                    gate = zs[k].to(tl.float32)
                    open = sigmoid(gate)
                    dgate = dys[k].to(tl.float32) * outs[k] * open * (1.0 + gate * (1.0 - open))
                    tl.store(dz + here, tl.where(mark[k] == PADDING, 0.0, dgate).to(dz.dtype.element_ty), mask=live)
            us, dts, dys, zs, beginnings = next_us, next_dts, next_dys, next_zs, next_beginnings
    for j in tl.static_range(J):
        tl.store(_saved(dA + j * (M * GROUP), part, padded, tile, unit, I, N, M), da[j])
        if not CHUNKED:
            where, mask = _state_tile(dinitial, batch, width, n_state, channel, j * M + n, unit)
            tl.store(where, g[j], mask=mask)
    tl.store(dD + wide_index(part) * width + offsets, dskip, mask=inside)
    tl.store(dbias + wide_index(part) * width + offsets, dstep_bias, mask=inside)
