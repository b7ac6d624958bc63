# mypy: ignore-errors
"""One decoded token of many rows: a Mamba layer as two products of the library and three kernels between them.

From some rows on the projections are large enough for the library. What bounds the rest is the state, which is read and
written once: a program of `recur_kernel` has all of its rows' states in flight at once. x_proj is summed up in few
shares where the convolution's step leaves its result, and the residual enters out_proj's accumulator.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import triton_step_cuts as cuts
from .triton_step_kernels import _matrix, _moments, _product, _ready, _vector

SHARES = 8  # of x_proj's sum at most; every program of `recur_kernel` adds them up
STATES = 4096  # that a program's registers hold


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`."""
    (batch, _, d), (width, n), taps, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    rows, conv_state, ssm_state = x.reshape(batch, d).contiguous(), conv_state.contiguous(), ssm_state.contiguous()
    conv_after, ssm_after = (t if in_place else torch.empty_like(t) for t in (conv_state, ssm_state))
    chosen, pdl, hidden, out = r + 2 * n, cuts.overlap(x), rows, None
    if norm_weight is not None:
        hidden, out = torch.empty_like(rows), torch.empty_like(rows)
        block = min(4096, triton.next_power_of_2(d))
        norm_kernel[(batch,)](
            rows, norm_weight, norm_bias, eps, hidden, out, batch, d,
            NORM=1 if norm_bias is None else 2, DEPTH=block, CHUNKS=triton.cdiv(d, block), **cuts.launch(4, pdl),
        )  # fmt: skip
    uz = F.linear(hidden, in_proj)

    how = cuts.cut("convolve", batch)
    chunks = triton.cdiv(triton.cdiv(width, how.columns), SHARES)
    shares, P = triton.cdiv(width, how.columns * chunks), max(16, triton.next_power_of_2(chosen))
    u, y = x.new_empty(batch, width), x.new_empty(batch, width)
    parts = x.new_empty(shares, batch, P, dtype=torch.float32)
    convolve_kernel[(shares, triton.cdiv(batch, how.rows))](
        uz, conv_state, conv_weight, conv_bias, x_proj, u, parts, conv_after, batch, width, chosen,
        TAPS=taps, P=P, ROWS=how.rows, C=how.columns, CHUNKS=chunks, **cuts.launch(how.warps, pdl),
    )  # fmt: skip

    how, N = cuts.cut("recur", batch), triton.next_power_of_2(n)
    columns = max(8, min(how.columns, STATES // (how.rows * N)))
    recur_kernel[(triton.cdiv(width, columns), triton.cdiv(batch, how.rows))](
        u, uz, parts, shares, dt_proj, dt_bias, A_log, D, ssm_state, ssm_after, y, batch, width, r, n,
        P=P, T=triton.next_power_of_2(shares), R=triton.next_power_of_2(r), N=N, ROWS=how.rows, C=columns,
        **cuts.launch(how.warps, pdl),
    )  # fmt: skip
    out = F.linear(y, out_proj) if out is None else out.addmm_(y, out_proj.T)
    return out[:, None], conv_after, ssm_after


@triton.jit
def norm_kernel(
    x, weight, bias, eps, hidden, copy, batch, d,
    NORM: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The norm of a row; and a copy of the row, to which out_proj's product is added."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, DEPTH)
    scale = _vector(weight, column, d)
    shift = tl.zeros((DEPTH,), tl.float32)
    if NORM == 2:
        shift = _vector(bias, column, d)
    _ready(PDL)
    mean, inverse = _moments(x, rows, batch, d, eps, NORM, DEPTH, CHUNKS)
    for c in tl.static_range(CHUNKS):
        column = c * DEPTH + tl.arange(0, DEPTH)
        if c > 0:
            scale = _vector(weight, column, d)
            if NORM == 2:
                shift = _vector(bias, column, d)
        v = _matrix(x, rows, batch, column, d)
        place = rows[:, None].to(tl.int64) * d + column[None, :]
        inside = (rows < batch)[:, None] & (column < d)[None, :]
        tl.store(copy + place, v, mask=inside)
        v = (v.to(tl.float32) - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
        tl.store(hidden + place, v, mask=inside)


@triton.jit
def convolve_kernel(
    uz, before, weight, bias, x_proj, u_out, parts, after, batch, width, chosen,
    TAPS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The convolution's step of CHUNKS times C channels, and their share of x_proj."""
    share = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, P)
    wp = _matrix(x_proj, p, chosen, share * CHUNKS * C + tl.arange(0, C), width)
    sums = tl.zeros((ROWS, P), tl.float32)
    _ready(PDL)
    for c in tl.static_range(CHUNKS):
        channel = (share * CHUNKS + c) * C + tl.arange(0, C)
        inside = (rows < batch)[:, None] & (channel < width)[None, :]
        place = rows[:, None].to(tl.int64) * width + channel[None, :]
        u = tl.load(uz + rows[:, None].to(tl.int64) * (2 * width) + channel[None, :], mask=inside, other=0.0)
        total = tl.zeros((ROWS, C), tl.float32)
        if bias is not None:
            total += _vector(bias, channel, width)[None, :]
        total += u.to(tl.float32) * _vector(weight + TAPS - 1, channel * TAPS, width * TAPS - TAPS + 1)[None, :]
        for k in tl.static_range(TAPS - 1):
            old = tl.load(before + place * (TAPS - 1) + k, mask=inside, other=0.0)
            total += old.to(tl.float32) * _vector(weight + k, channel * TAPS, width * TAPS - TAPS + 1)[None, :]
            if k > 0:
                tl.store(after + place * (TAPS - 1) + k - 1, old, mask=inside)
        if TAPS > 1:
            tl.store(after + place * (TAPS - 1) + TAPS - 2, u, mask=inside)
        total = (total * tl.sigmoid(total)).to(uz.dtype.element_ty).to(tl.float32)
        tl.store(u_out + place, total, mask=inside)
        sums += _product(total, wp, True)
        if c + 1 < CHUNKS:
            wp = _matrix(x_proj, p, chosen, channel + C, width)
    where = parts + (share * batch + rows[:, None]).to(tl.int64) * P + p[None, :]
    tl.store(where, sums, mask=(rows < batch)[:, None] & (p < P)[None, :])


@triton.jit
def _summed(parts, first, rows, batch, count, shares, P: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr):
    """(ROWS, COUNT): `count` entries from `first` on of each row, added up over the shares."""
    column = tl.arange(0, COUNT)
    inside = (rows < batch)[:, None] & (column < count)[None, :]
    total = tl.zeros((rows.shape[0], COUNT), tl.float32)
    for t in tl.static_range(T):
        where = parts + (t * batch + rows[:, None]).to(tl.int64) * P + first + column[None, :]
        total += tl.load(where, mask=inside & (t < shares), other=0.0)
    return total


@triton.jit
def recur_kernel(
    u, uz, parts, shares, dt_proj, dt_bias, A_log, skip, before, after, y, batch, width, r, n_state,
    P: tl.constexpr, T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt_proj, the recurrence and the gate: C channels of ROWS rows, all at once."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k, n = tl.arange(0, R), tl.arange(0, N)
    w = _matrix(dt_proj, channel, width, k, r).to(tl.float32)
    A = -tl.exp(_matrix(A_log, channel, width, n, n_state).to(tl.float32))
    D, bias = _vector(skip, channel, width), _vector(dt_bias, channel, width)
    inside = (rows < batch)[:, None] & (channel < width)[None, :]
    place = rows[:, None].to(tl.int64) * width + channel[None, :]
    cell = place[:, :, None] * n_state + n[None, None, :]
    states = inside[:, :, None] & (n < n_state)[None, None, :]
    # Asked for early too: all kernels before `convolve_kernel`, the one that this one overlaps, have ended.
    h = tl.load(before + cell, mask=states, other=0.0).to(tl.float32)
    _ready(PDL)
    x = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(uz + place + rows[:, None].to(tl.int64) * width + width, mask=inside, other=0.0).to(tl.float32)
    low = _summed(parts, 0, rows, batch, r, shares, P, T, R)
    B = _summed(parts, r, rows, batch, n_state, shares, P, T, N)
    Cs = _summed(parts, r + n_state, rows, batch, n_state, shares, P, T, N)
    step = tl.sum(w[None, :, :] * low[:, None, :], 2) + bias[None, :]
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))  # softplus
    h = h * tl.exp(step[:, :, None] * A[None, :, :]) + (step * x)[:, :, None] * B[:, None, :]
    tl.store(after + cell, h, mask=states)
    out = (tl.sum(h * Cs[:, None, :], 2) + x * D[None, :]) * gate * tl.sigmoid(gate)
    tl.store(y + place, out, mask=inside)
