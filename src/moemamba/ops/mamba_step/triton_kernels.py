# mypy: ignore-errors
"""Triton kernels of one decoded token: three a Mamba layer, two for the most likely word.

A token is a chain of short kernels, each of which waits for the one before, so what counts is how few there are and how
little of each is waiting. Weights are asked for before `ready`, while the kernel before still runs (programmatic
dependent launch, PDL); activations and states only after it. A kernel lets the next one begin once it has itself
waited, so that no two kernels that are not neighbours ever run at the same time.

ROWS rows of the batch share the weights that a program reads. One row takes sums of products (DOT False), several the
tensor cores. DEPTH times CHUNKS covers a sum's length.
"""

import triton
import triton.language as tl

from ..kit.triton import matrix, ready, vector
from ..kit.triton_step import moments, product


@triton.jit
def enter_kernel(
    x, norm_weight, norm_bias, eps, in_proj, conv_before, conv_weight, conv_bias, x_proj,
    u_out, z_out, parts, conv_after, batch, d, width, chosen,
    NORM: tl.constexpr, TAPS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, both halves of in_proj, the convolution's step, and these channels' share of x_proj."""
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tile * C + tl.arange(0, C)
    column, p = tl.arange(0, DEPTH), tl.arange(0, P)
    gate = in_proj + (tl.full((), 0, tl.int64) + width) * d  # in_proj's second half
    wu = matrix(in_proj, channel, width, column, d)
    wz = matrix(gate, channel, width, column, d)
    wp = matrix(x_proj, p, chosen, channel, width)
    total = tl.zeros((ROWS, C), tl.float32)
    if conv_bias is not None:
        total += vector(conv_bias, channel, width)[None, :]
    if NORM:
        scale = vector(norm_weight, column, d)
        shift = tl.zeros((DEPTH,), tl.float32)
        if NORM == 2:
            shift = vector(norm_bias, column, d)
    ready(PDL)
    if NORM:
        mean, inverse = moments(x, rows, batch, d, eps, NORM, DEPTH, CHUNKS)
    u = tl.zeros((ROWS, C), tl.float32)
    z = tl.zeros((ROWS, C), tl.float32)
    for c in tl.static_range(CHUNKS):
        h = matrix(x, rows, batch, c * DEPTH + column, d).to(tl.float32)
        if NORM:
            h = (h - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]
            h = h.to(x.dtype.element_ty).to(tl.float32)
        u += product(h, wu, DOT)
        z += product(h, wz, DOT)
        if c + 1 < CHUNKS:
            wu = matrix(in_proj, channel, width, (c + 1) * DEPTH + column, d)
            wz = matrix(gate, channel, width, (c + 1) * DEPTH + column, d)
            if NORM:
                scale = vector(norm_weight, (c + 1) * DEPTH + column, d)
                if NORM == 2:
                    shift = vector(norm_bias, (c + 1) * DEPTH + column, d)
    inside = (rows < batch)[:, None] & (channel < width)[None, :]
    place = rows[:, None].to(tl.int64) * width + channel[None, :]
    u = u.to(x.dtype.element_ty).to(tl.float32)  # as the convolution's state holds it
    total += u * vector(conv_weight + TAPS - 1, channel * TAPS, width * TAPS - TAPS + 1)[None, :]
    for k in tl.static_range(TAPS - 1):
        old = tl.load(conv_before + place * (TAPS - 1) + k, mask=inside, other=0.0).to(tl.float32)
        total += old * vector(conv_weight + k, channel * TAPS, width * TAPS - TAPS + 1)[None, :]
        if k > 0:
            tl.store(conv_after + place * (TAPS - 1) + k - 1, old, mask=inside)
    if TAPS > 1:
        tl.store(conv_after + place * (TAPS - 1) + TAPS - 2, u, mask=inside)
    total = (total * tl.sigmoid(total)).to(x.dtype.element_ty).to(tl.float32)
    tl.store(u_out + place, total, mask=inside)
    tl.store(z_out + place, z, mask=inside)
    share = product(total, wp, DOT)
    where = parts + (tile * batch + rows[:, None]).to(tl.int64) * P + p[None, :]
    tl.store(where, share, mask=(rows < batch)[:, None] & (p < P)[None, :])


@triton.jit
def scan_kernel(
    u, z, parts, tiles, dt_proj, dt_bias, A_log, skip, before, after, y, batch, width, r, n_state,
    P: tl.constexpr, T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt_proj, the recurrence, and the gate; x_proj's shares are added up first."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    inside = channel < width
    t, k, n = tl.arange(0, T), tl.arange(0, R), tl.arange(0, N)
    w = matrix(dt_proj, channel, width, k, r).to(tl.float32)
    A = -tl.exp(matrix(A_log, channel, width, n, n_state).to(tl.float32))
    D, bias = vector(skip, channel, width), vector(dt_bias, channel, width)
    states = inside[:, None] & (n < n_state)[None, :]
    ready(PDL)
    first = tl.program_id(1) * ROWS
    for row in range(first, tl.minimum(first + ROWS, batch)):
        base = parts + (t[:, None] * batch + row).to(tl.int64) * P
        real = (t < tiles)[:, None]
        place = (row * width + channel).to(tl.int64)
        cell = place[:, None] * n_state + n[None, :]
        h = tl.load(before + cell, mask=states, other=0.0).to(tl.float32)
        low = tl.sum(tl.load(base + k[None, :], mask=real & (k < r)[None, :], other=0.0), 0)
        B = tl.sum(tl.load(base + r + n[None, :], mask=real & (n < n_state)[None, :], other=0.0), 0)
        Cs = tl.sum(tl.load(base + r + n_state + n[None, :], mask=real & (n < n_state)[None, :], other=0.0), 0)
        x = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        step = tl.sum(w * low[None, :], 1) + bias
        step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))  # softplus
        h = h * tl.exp(step[:, None] * A) + (step * x)[:, None] * B[None, :]
        tl.store(after + cell, h, mask=states)
        out = (tl.sum(h * Cs[None, :], 1) + x * D) * gate * tl.sigmoid(gate)
        tl.store(y + place, out, mask=inside)


@triton.jit
def leave_kernel(
    y, weight, residual, out, batch, d, width, ROWS: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = y weight.T, plus the residual if there is one."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    column = tl.arange(0, DEPTH)
    w = matrix(weight, feature, d, column, width)
    ready(PDL)
    inside = (rows < batch)[:, None] & (feature < d)[None, :]
    place = rows[:, None].to(tl.int64) * d + feature[None, :]
    total = tl.zeros((ROWS, C), tl.float32)
    if residual is not None:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    for c in tl.static_range(CHUNKS):
        total += product(matrix(y, rows, batch, c * DEPTH + column, width).to(tl.float32), w, DOT)
        if c + 1 < CHUNKS:
            w = matrix(weight, feature, d, (c + 1) * DEPTH + column, width)
    tl.store(out + place, total, mask=inside)


@triton.jit
def best_kernel(
    x, weight, best, index, batch, d, words, ROWS: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest logit of C words for each row, and whose it is; rows first, so that neighbours share the weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * C + tl.arange(0, C)
    column = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, C), tl.float32)
    if DOT:
        ready(PDL)
        for start in range(0, d, DEPTH):
            a = matrix(x, rows, batch, start + column, d)
            b = matrix(weight, word, words, start + column, d)
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    else:
        w = matrix(weight, word, words, column, d)
        ready(PDL)
        for c in tl.static_range(CHUNKS):
            total += product(matrix(x, rows, batch, c * DEPTH + column, d).to(tl.float32), w, DOT)
            if c + 1 < CHUNKS:
                w = matrix(weight, word, words, (c + 1) * DEPTH + column, d)
    logits = total.to(x.dtype.element_ty).to(tl.float32)
    logits = tl.where((word < words)[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    first = tl.min(tl.where(logits == top[:, None], word[None, :], 2147483647), 1)
    where = tl.program_id(1).to(tl.int64) * batch + rows
    tl.store(best + where, top, mask=rows < batch)
    tl.store(index + where, first, mask=rows < batch)


@triton.jit
def choose_kernel(best, index, token, tiles, batch, T: tl.constexpr, PDL: tl.constexpr):
    """The best of all tiles; the first of those that are equal."""
    row = tl.program_id(0)
    t = tl.arange(0, T)
    ready(PDL)
    top = tl.load(best + t.to(tl.int64) * batch + row, mask=t < tiles, other=float("-inf"))
    first = tl.load(index + t.to(tl.int64) * batch + row, mask=t < tiles, other=2147483647)
    chosen = tl.min(tl.where(top == tl.max(top, 0), first, 2147483647), 0)
    tl.store(token + row, tl.minimum(chosen, 2147483646).to(tl.int64))
