# mypy: ignore-errors
"""Triton kernels of one decoded token's experts: how they read no weight twice and wait for as little as possible.

As in `mamba_step/triton_kernels.py` a kernel asks for what does not depend on the one before it, and only then waits
for it (`ready`). Letters besides the usual: pairs are choices, `row * k + choice`; DEPTH times CHUNKS covers a sum.
"""

import triton
import triton.language as tl

from ..kit.triton import matrix, ready, vector
from ..kit.triton_step import activated, ask_for, moments, normalised, product


@triton.jit
def _likely(logits, logit_bias, expert, n_experts, SIGMOID: tl.constexpr):
    """Scores (ROWS, E) of logits, zero beyond the experts."""
    if logit_bias is not None:
        logits += vector(logit_bias, expert, n_experts)[None, :]
    if SIGMOID:
        likely = tl.sigmoid(logits)
    else:
        logits = tl.where((expert < n_experts)[None, :], logits, float("-inf"))
        likely = tl.exp(logits - tl.max(logits, 1)[:, None])
        likely = likely / tl.sum(likely, 1)[:, None]
    return likely


@triton.jit
def _choosing(likely, balance_bias, expert, n_experts):
    """What choices are made by."""
    scores = likely + vector(balance_bias, expert, n_experts)[None, :]
    scores = tl.where(scores == scores, scores, -1e30)  # of nonsense the first experts, each once
    return tl.where((expert < n_experts)[None, :], scores, float("-inf"))


@triton.jit
def _best(scores, expert, E: tl.constexpr):
    """(ROWS,): the best expert of each row, the first of equals."""
    return tl.min(tl.where(scores == tl.max(scores, 1)[:, None], expert[None, :], E - 1), 1)


@triton.jit
def _logits(
    x, rows, batch, d, router, n_experts, w, mean, inverse, norm_weight, norm_bias,
    NORM: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(ROWS, E) of some rows; `w` is the first chunk of the router's weights."""
    column, expert = tl.arange(0, DEPTH), tl.arange(0, E)
    logits = tl.zeros((rows.shape[0], E), tl.float32)
    for c in tl.static_range(CHUNKS):
        h = normalised(x, rows, batch, c * DEPTH + column, d, mean, inverse, norm_weight, norm_bias, NORM)
        logits += product(h, w, DOT)
        if c + 1 < CHUNKS:
            w = matrix(router, expert, n_experts, (c + 1) * DEPTH + column, d)
    return logits


@triton.jit
def route_kernel(
    x, norm_weight, norm_bias, eps, router, logit_bias, balance_bias, h, indices, gates, batch, n_experts, d,
    NORM: tl.constexpr, SIGMOID: tl.constexpr, K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, router and choices of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, expert = tl.arange(0, DEPTH), tl.arange(0, E)
    w = matrix(router, expert, n_experts, column, d)
    ready(PDL)
    mean = tl.zeros((ROWS,), tl.float32)
    inverse = mean + 1.0
    if NORM:
        mean, inverse = moments(x, rows, batch, d, eps, NORM, DEPTH, CHUNKS)
        for c in tl.static_range(CHUNKS):
            at = c * DEPTH + column
            v = normalised(x, rows, batch, at, d, mean, inverse, norm_weight, norm_bias, NORM)
            inside = (rows < batch)[:, None] & (at < d)[None, :]
            tl.store(h + rows[:, None].to(tl.int64) * d + at[None, :], v, mask=inside)
    logits = _logits(
        x, rows, batch, d, router, n_experts, w, mean, inverse, norm_weight, norm_bias, NORM, E, DEPTH, CHUNKS, DOT
    )
    likely = _likely(logits, logit_bias, expert, n_experts, SIGMOID)
    scores = _choosing(likely, balance_bias, expert, n_experts)
    for k in tl.static_range(K):
        best = _best(scores, expert, E)
        chosen = expert[None, :] == best[:, None]
        tl.store(indices + rows * K + k, best, mask=rows < batch)
        tl.store(gates + rows * K + k, tl.sum(tl.where(chosen, likely, 0.0), 1), mask=rows < batch)
        scores = tl.where(chosen, float("-inf"), scores)


@triton.jit
def up_few_kernel(
    x, norm_weight, norm_bias, eps, router, logit_bias, balance_bias, indices, gates, up, up_bias, down, hidden,
    n_experts, d, f,
    ROUTE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, ACTIVATION: tl.constexpr, GROUPS: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, WIDES: tl.constexpr,
    C: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, LINES: tl.constexpr, ROUTER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """C hidden features of one choice. With ROUTE every program finds out by itself which expert that is.

    That costs no more than to wait for a kernel that does: the router's weights (WIDE times WIDES columns, ROUTER times
    128 bytes) are asked for while the kernel before still runs. Once the expert is known, this program's share of its
    second matrix (LINES times 128 bytes) is brought nearer too, for the kernel that comes next.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    feature, column, experts = tile * C + tl.arange(0, C), tl.arange(0, DEPTH), tl.arange(0, E)
    row = pair // K + tl.arange(0, 1)
    batch = tl.num_programs(1) // K
    if ROUTE:
        w = matrix(router, experts, n_experts, tl.arange(0, WIDE), d)
        if PDL:
            ask_for(router, 0, n_experts * d, ROUTER)
    ready(PDL)
    mean = tl.zeros((1,), tl.float32)
    inverse = mean + 1.0
    if NORM:
        mean, inverse = moments(x, row, batch, d, eps, NORM, DEPTH, CHUNKS)
    if ROUTE:
        logits = _logits(
            x, row, batch, d, router, n_experts, w, mean, inverse, norm_weight, norm_bias, NORM, E, WIDE, WIDES, False
        )
        likely = _likely(logits, logit_bias, experts, n_experts, SIGMOID)
        scores = _choosing(likely, balance_bias, experts, n_experts)
        chosen = tl.zeros((1,), tl.int32)
        for k in tl.static_range(K):
            best = _best(scores, experts, E)
            chosen = tl.where(pair % K == k, best, chosen)
            scores = tl.where(experts[None, :] == best[:, None], float("-inf"), scores)
        expert = tl.max(chosen, 0).to(tl.int64)
        gate = tl.sum(tl.sum(tl.where(experts[None, :] == chosen[:, None], likely, 0.0), 1), 0)
        if tile == 0:
            tl.store(indices + pair, expert.to(tl.int32))
            tl.store(gates + pair, gate)
    else:
        expert = tl.load(indices + pair).to(tl.int64)
    if PDL:
        size = (tl.full((), 0, tl.int64) + d) * f
        lines = 1024 // down.dtype.element_ty.primitive_bitwidth * LINES
        ask_for(down + expert * size, tile.to(tl.int64) * lines, size, LINES)
    first = up + expert * (GROUPS * f) * d
    second = first + (tl.full((), 0, tl.int64) + f) * d
    a = tl.zeros((1, C), tl.float32)
    b = tl.zeros((1, C), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = c * DEPTH + column
        wa = matrix(first, feature, f, at, d)
        if GROUPS == 2:
            wb = matrix(second, feature, f, at, d)
        v = normalised(x, row, batch, at, d, mean, inverse, norm_weight, norm_bias, NORM)
        a += product(v, wa, False)
        if GROUPS == 2:
            b += product(v, wb, False)
    if up_bias is not None:
        a += vector(up_bias + expert * (GROUPS * f), feature, f)[None, :]
        if GROUPS == 2:
            b += vector(up_bias + expert * (GROUPS * f) + f, feature, f)[None, :]
    where = hidden + pair.to(tl.int64) * f + feature[None, :]
    tl.store(where, activated(a, b, ACTIVATION), mask=(feature < f)[None, :])


@triton.jit
def down_few_kernel(
    hidden, indices, gates, down, down_bias, residual, y, d, f,
    K: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C output features of one row, over its choices, and what it was before."""
    row = tl.program_id(1)
    feature, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, DEPTH)
    ready(PDL)
    total = tl.zeros((C,), tl.float32)
    for k in tl.static_range(K):
        pair = row * K + k
        expert = tl.load(indices + pair).to(tl.int64)
        own = tl.zeros((C,), tl.float32)
        for c in tl.static_range(CHUNKS):
            w = matrix(down + expert * d * f, feature, d, c * DEPTH + column, f).to(tl.float32)
            v = vector(hidden + pair.to(tl.int64) * f, c * DEPTH + column, f)
            own += tl.sum(w * v[None, :], 1)
        if down_bias is not None:
            own += vector(down_bias + expert * d, feature, d)
        total += tl.load(gates + pair) * own
    place = row.to(tl.int64) * d + feature
    if residual is not None:
        total += tl.load(residual + place, mask=feature < d, other=0.0).to(tl.float32)
    tl.store(y + place, total, mask=feature < d)


@triton.jit
def list_kernel(indices, lists, counts, pairs, P: tl.constexpr, PDL: tl.constexpr):
    """lists (e, pairs): the pairs that chose an expert, in order; counts (e,): how many."""
    expert, pair = tl.program_id(0), tl.arange(0, P)
    ready(PDL)
    mine = tl.load(indices + pair, mask=pair < pairs, other=-1) == expert
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(lists + expert * pairs + rank, pair, mask=mine)
    tl.store(counts + expert, tl.sum(mine.to(tl.int32), 0))


@triton.jit
def _found(indices, lists, counts, expert, pairs, P: tl.constexpr):
    """How many pairs chose an expert, which ones (P,), and of each its place among them; lists say the same."""
    pair = tl.arange(0, P)
    mine = pair < 0
    rank = pair
    if lists is None:
        mine = tl.load(indices + pair, mask=pair < pairs, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        count = tl.sum(mine.to(tl.int32), 0)
    else:
        count = tl.load(counts + expert)
    return count, mine, rank


@triton.jit
def _taken(lists, expert, pairs, mine, rank, slot, count, P: tl.constexpr):
    """(ROWS,): the pairs of an expert's places `slot`; anything beyond `count`."""
    if lists is None:
        here = mine[None, :] & (rank[None, :] == slot[:, None])
        pair = tl.sum(tl.where(here, tl.arange(0, P)[None, :], 0), 1)
    else:
        pair = tl.load(lists + expert * pairs + slot, mask=slot < count, other=0)
    return pair


@triton.jit
def up_many_kernel(
    x, indices, lists, counts, up, up_bias, hidden, pairs, d, f,
    ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, P: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C hidden features of all pairs that chose one expert, ROWS at a time.

    With LINES the weights begin their way before it is known whether anybody chose this expert.
    """
    expert = tl.program_id(1).to(tl.int64)
    feature, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, DEPTH)
    size = (tl.full((), 0, tl.int64) + f) * d
    first = up + expert * GROUPS * size
    if LINES:
        ask_for(first, tl.program_id(0).to(tl.int64) * C * d, size, LINES)
        if GROUPS == 2:
            ask_for(first + size, tl.program_id(0).to(tl.int64) * C * d, size, LINES)
    ready(PDL)
    count, mine, rank = _found(indices, lists, counts, expert, pairs, P)
    for start in range(0, count, ROWS):
        slot = start + tl.arange(0, ROWS)
        pair = _taken(lists, expert, pairs, mine, rank, slot, count, P)
        real = slot < count
        row = x + (pair // K).to(tl.int64)[:, None] * d
        a = tl.zeros((ROWS, C), tl.float32)
        b = tl.zeros((ROWS, C), tl.float32)
        for k in tl.range(0, d, DEPTH, num_stages=STAGES):
            at = k + column
            wa = matrix(first, feature, f, at, d)
            v = tl.load(row + at[None, :], mask=real[:, None] & (at < d)[None, :], other=0.0).to(wa.dtype)
            a = tl.dot(v, tl.trans(wa), a, input_precision="tf32x3")
            if GROUPS == 2:
                wb = matrix(first + size, feature, f, at, d)
                b = tl.dot(v, tl.trans(wb), b, input_precision="tf32x3")
        if up_bias is not None:
            a += vector(up_bias + expert * (GROUPS * f), feature, f)[None, :]
            if GROUPS == 2:
                b += vector(up_bias + expert * (GROUPS * f) + f, feature, f)[None, :]
        where = hidden + pair[:, None].to(tl.int64) * f + feature[None, :]
        tl.store(where, activated(a, b, ACTIVATION), mask=real[:, None] & (feature < f)[None, :])


@triton.jit
def down_many_kernel(
    hidden, indices, lists, counts, gates, down, down_bias, residual, y, pairs, d, f,
    P: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C output features of all pairs that chose one expert, times their gates; of top-1, what there was before too."""
    expert = tl.program_id(1).to(tl.int64)
    feature, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, DEPTH)
    size = (tl.full((), 0, tl.int64) + f) * d
    weight = down + expert * size
    if LINES:
        ask_for(weight, tl.program_id(0).to(tl.int64) * C * f, size, LINES)
    ready(PDL)
    count, mine, rank = _found(indices, lists, counts, expert, pairs, P)
    for start in range(0, count, ROWS):
        slot = start + tl.arange(0, ROWS)
        pair = _taken(lists, expert, pairs, mine, rank, slot, count, P)
        real = slot < count
        row = hidden + pair.to(tl.int64)[:, None] * f
        total = tl.zeros((ROWS, C), tl.float32)
        for k in tl.range(0, f, DEPTH, num_stages=STAGES):
            at = k + column
            w = matrix(weight, feature, d, at, f)
            v = tl.load(row + at[None, :], mask=real[:, None] & (at < f)[None, :], other=0.0).to(w.dtype)
            total = tl.dot(v, tl.trans(w), total, input_precision="tf32x3")
        if down_bias is not None:
            total += vector(down_bias + expert * d, feature, d)[None, :]
        total *= tl.load(gates + pair, mask=real, other=0.0)[:, None]
        place = pair[:, None].to(tl.int64) * d + feature[None, :]
        inside = real[:, None] & (feature < d)[None, :]
        if residual is not None:
            total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, total, mask=inside)


@triton.jit
def sum_kernel(parts, residual, y, d, K: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr):
    """C output features of one row: the sum of its choices, and what it was before."""
    row = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    ready(PDL)
    total = tl.zeros((C,), tl.float32)
    for k in tl.static_range(K):
        total += vector(parts + (row * K + k) * d, feature, d)
    if residual is not None:
        total += vector(residual + row * d, feature, d)
    tl.store(y + row * d + feature, total, mask=feature < d)
