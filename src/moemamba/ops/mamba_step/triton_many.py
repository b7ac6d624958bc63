# mypy: ignore-errors
"""One decoded token of many rows: a Mamba layer as two products of the library and five kernels.

From some rows on in_proj and out_proj are large enough for the library, and the residual enters out_proj's accumulator.
What bounds the rest is the state, which is read and written once. So `recur_kernel` does little else and asks for it
while the kernel before still runs. x_proj has too few columns to fill a GPU: its sum is cut into shares, which are
added up by the kernel of dt_proj.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..kit.triton import launch, matrix, overlap, ready, vector
from ..kit.triton_step import moments, product
from . import triton_cuts as cuts

SHARES = 8  # of x_proj's sum at most; every program of `widen_kernel` adds them up
STATES = 4096  # that a program's registers hold


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: tuple[Tensor, ...],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`, whose arguments from in_proj to out_proj are `weights`."""
    in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj = weights
    (batch, _, d), (width, n), taps, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    rows, conv_state, ssm_state = x.reshape(batch, d).contiguous(), conv_state.contiguous(), ssm_state.contiguous()
    conv_after, ssm_after = (t if in_place else torch.empty_like(t) for t in (conv_state, ssm_state))
    chosen, pdl, hidden, out = r + 2 * n, overlap(x), rows, None
    if norm_weight is not None:
        hidden, out = torch.empty_like(rows), torch.empty_like(rows)
        block = min(4096, triton.next_power_of_2(d))
        norm_kernel[(batch,)](
            rows, norm_weight, norm_bias, eps, hidden, out, batch, d,
            NORM=1 if norm_bias is None else 2, DEPTH=block, CHUNKS=triton.cdiv(d, block), **launch(4, pdl),
        )  # fmt: skip
    uz = F.linear(hidden, in_proj)

    how, u = cuts.cut("convolve", batch), x.new_empty(batch, width)
    convolve_kernel[(triton.cdiv(width, how.columns), batch)](
        uz, conv_state, conv_weight, conv_bias, u, conv_after, width,
        TAPS=taps, C=how.columns, **launch(how.warps, pdl),
    )  # fmt: skip

    how, P = cuts.cut("share", batch), max(16, triton.next_power_of_2(chosen))
    block = min(how.depth, max(16, triton.next_power_of_2(width)))
    chunks = triton.cdiv(triton.cdiv(width, block), SHARES)
    shares = triton.cdiv(width, block * chunks)
    parts = x.new_empty(shares, batch, P, dtype=torch.float32)
    share_kernel[(shares, triton.cdiv(batch, how.rows))](
        u, x_proj, parts, batch, width, chosen,
        P=P, ROWS=how.rows, C=block, CHUNKS=chunks, **launch(how.warps, pdl),
    )  # fmt: skip

    how, N, T = cuts.cut("widen", batch), triton.next_power_of_2(n), triton.next_power_of_2(shares)
    dt, bc = (x.new_empty(batch, size, dtype=torch.float32) for size in (width, 2 * n))
    widen_kernel[(triton.cdiv(width, how.columns), triton.cdiv(batch, how.rows))](
        parts, shares, dt_proj, dt_bias, dt, bc, batch, width, r, 2 * n,
        P=P, T=T, R=max(16, triton.next_power_of_2(r)), N=2 * N, ROWS=how.rows, C=how.columns,
        **launch(how.warps, pdl),
    )  # fmt: skip

    how, y = cuts.cut("recur", batch), x.new_empty(batch, width)
    columns = max(8, min(how.columns, STATES // (how.rows * N)))
    recur_kernel[(triton.cdiv(width, columns), triton.cdiv(batch, how.rows))](
        u, uz, dt, bc, A_log, D, ssm_state, ssm_after, y, batch, width, n,
        N=N, ROWS=how.rows, C=columns, **launch(how.warps, pdl),
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
    scale = vector(weight, column, d)
    shift = tl.zeros((DEPTH,), tl.float32)
    if NORM == 2:
        shift = vector(bias, column, d)
    ready(PDL)
    mean, inverse = moments(x, rows, batch, d, eps, NORM, DEPTH, CHUNKS)
    for c in tl.static_range(CHUNKS):
        column = c * DEPTH + tl.arange(0, DEPTH)
        if c > 0:
            scale = vector(weight, column, d)
            if NORM == 2:
                shift = vector(bias, column, d)
        v = matrix(x, rows, batch, column, d)
        place = rows[:, None].to(tl.int64) * d + column[None, :]
        inside = (rows < batch)[:, None] & (column < d)[None, :]
        tl.store(copy + place, v, mask=inside)
        v = (v.to(tl.float32) - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
        tl.store(hidden + place, v, mask=inside)


@triton.jit
def convolve_kernel(
    uz, before, weight, bias, u_out, after, width, TAPS: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The convolution's step and SiLU: C channels of a row."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * C + tl.arange(0, C)
    inside, place = channel < width, row * width + channel
    total = tl.zeros((C,), tl.float32)
    if bias is not None:
        total += vector(bias, channel, width)
    ready(PDL)
    u = tl.load(uz + row * 2 * width + channel, mask=inside, other=0.0)
    total += u.to(tl.float32) * vector(weight + TAPS - 1, channel * TAPS, width * TAPS - TAPS + 1)
    for k in tl.static_range(TAPS - 1):
        old = tl.load(before + place * (TAPS - 1) + k, mask=inside, other=0.0)
        total += old.to(tl.float32) * vector(weight + k, channel * TAPS, width * TAPS - TAPS + 1)
        if k > 0:
            tl.store(after + place * (TAPS - 1) + k - 1, old, mask=inside)
    if TAPS > 1:
        tl.store(after + place * (TAPS - 1) + TAPS - 2, u, mask=inside)
    tl.store(u_out + place, total * tl.sigmoid(total), mask=inside)


@triton.jit
def share_kernel(
    u, x_proj, parts, batch, width, chosen,
    P: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The share that CHUNKS times C channels have in x_proj's sum."""
    share = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p, channel = tl.arange(0, P), share * CHUNKS * C + tl.arange(0, C)
    w = matrix(x_proj, p, chosen, channel, width)
    sums = tl.zeros((ROWS, P), tl.float32)
    ready(PDL)
    for c in tl.static_range(CHUNKS):
        sums += product(matrix(u, rows, batch, channel + c * C, width), w, True)
        if c + 1 < CHUNKS:
            w = matrix(x_proj, p, chosen, channel + (c + 1) * C, width)
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
def widen_kernel(
    parts, shares, dt_proj, dt_bias, dt, bc, batch, width, r, both,
    P: tl.constexpr, T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt = softplus(dt_proj x_proj's first rows), C channels; the first programs also write B and C, the rest of it."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = matrix(dt_proj, channel, width, tl.arange(0, R), r)
    bias = vector(dt_bias, channel, width)
    ready(PDL)
    step = product(_summed(parts, 0, rows, batch, r, shares, P, T, R), w, True) + bias[None, :]
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    place = rows[:, None].to(tl.int64) * width + channel[None, :]
    tl.store(dt + place, step, mask=(rows < batch)[:, None] & (channel < width)[None, :])
    if tl.program_id(0) == 0:
        n = tl.arange(0, N)
        rest = _summed(parts, r, rows, batch, both, shares, P, T, N)
        where = bc + rows[:, None].to(tl.int64) * both + n[None, :]
        tl.store(where, rest, mask=(rows < batch)[:, None] & (n < both)[None, :])


@triton.jit
def recur_kernel(
    u, uz, dt, bc, A_log, skip, before, after, y, batch, width, n_state,
    N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The recurrence and the gate: C channels of ROWS rows, all at once."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    inside = (rows < batch)[:, None] & (channel < width)[None, :]
    place = rows[:, None].to(tl.int64) * width + channel[None, :]
    cell = place[:, :, None] * n_state + n[None, None, :]
    states = inside[:, :, None] & (n < n_state)[None, None, :]
    # Asked for early too: all kernels before `widen_kernel`, the one that this one overlaps, have ended.
    h = tl.load(before + cell, mask=states, other=0.0).to(tl.float32)
    A = -tl.exp(matrix(A_log, channel, width, n, n_state).to(tl.float32))
    D = vector(skip, channel, width)
    ready(PDL)
    step = tl.load(dt + place, mask=inside, other=0.0)
    x = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(uz + place + rows[:, None].to(tl.int64) * width + width, mask=inside, other=0.0).to(tl.float32)
    B = matrix(bc, rows, batch, n, 2 * n_state)
    Cs = tl.load(
        bc + rows[:, None].to(tl.int64) * 2 * n_state + n_state + n[None, :],
        mask=(rows < batch)[:, None] & (n < n_state)[None, :], other=0.0,
    )  # fmt: skip
    h = h * tl.exp(step[:, :, None] * A[None, :, :]) + (step * x)[:, :, None] * B[:, None, :]
    tl.store(after + cell, h, mask=states)
    out = (tl.sum(h * Cs[:, None, :], 2) + x * D[None, :]) * gate * tl.sigmoid(gate)
    tl.store(y + place, out, mask=inside)
