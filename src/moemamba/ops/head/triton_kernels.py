"""The kernels of `triton_cross_entropy.py`.

From `refer` to `divide`: scores that are stored. A row's scores are relative to one logit, its reference, and are
divided by their sum in the (t, d) operands and results of the products that use them, so that no pass over the scores
themselves is needed. Then `hidden_gradient` and `weight_gradient`: scores that are computed once for each of the two.

Logarithms and exponents are to base 2. Letters besides the usual: rows, the tokens of a chunk.
"""

import triton
import triton.language as tl

from ..kit.triton import halves


@triton.jit
def refer(hidden, weight, targets, reference, tokens, depth, ignore_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """reference (t,): each target's own logit, as a power of 2; infinite where the position does not count."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < tokens, other=ignore_index).to(tl.int64)
    counts = target != ignore_index
    logit = tl.zeros((ROWS,), tl.float32)
    for k in range(0, depth, COLUMNS):
        column = k + tl.arange(0, COLUMNS)
        mask = counts[:, None] & (column < depth)[None, :]
        h = tl.load(hidden + row.to(tl.int64)[:, None] * depth + column[None, :], mask=mask, other=0.0)
        w = tl.load(weight + target[:, None] * depth + column[None, :], mask=mask, other=0.0)
        logit += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    tl.store(reference + row, tl.where(counts, logit * LOG2_E, float("inf")), mask=row < tokens)


@triton.jit
def _powers(product, scores, reference, row, column, v):
    """2^(logit - reference) of a tile, into scores; their sums by row."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    columns = column + tl.arange(0, product.shape[1])
    powers = tl.exp2(product * LOG2_E - reference[:, None])
    counts = reference < float("inf")  # what does not count is zero, be it not a number
    powers = tl.where((columns < v)[None, :] & counts[:, None], powers, 0.0)
    if scores is not None:
        scores.store([row, column], powers.to(scores.dtype))
    return tl.sum(powers, 1)


@triton.jit
def score(
    hidden, weight, scores, reference, sums, rows, v, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """scores (rows, v) = 2^(hidden @ weight.T - reference); sums (v tiles, rows), each tile's share of a row's sum."""
    down = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), down * tl.cdiv(v, COLUMNS), tl.num_programs(0), flatten=True):
        row = tile % down * ROWS  # neighbours share columns of the weight, whose tiles are read once a chunk
        column = tile // down * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            product = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, product, input_precision="tf32x3")
        place = row + tl.arange(0, ROWS)
        given = tl.load(reference + place, mask=place < rows, other=float("inf"))
        left, right = halves(product)
        total = _powers(left, scores, given, row, column, v)
        total += _powers(right, scores, given, row, column + COLUMNS // 2, v)
        tl.store(sums + (tile // down).to(tl.int64) * rows + place, total, mask=place < rows)


@triton.jit
def _logits(
    hidden, weight, row, rows, columns, v, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """A tile of hidden @ weight.T as powers of 2."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        inner = k + tl.arange(0, DEPTH)
        mask = (inner < depth)[None, :]
        h = tl.load(hidden + row[:, None] * depth + inner[None, :], mask=(row < rows)[:, None] & mask, other=0.0)
        w = tl.load(weight + columns.to(tl.int64)[:, None] * depth + inner[None, :], mask=(columns < v)[:, None] & mask)
        product = tl.dot(h, w.T, product, input_precision="tf32x3")
    return tl.where((columns < v)[None, :], product * LOG2_E, float("-inf"))


@triton.jit
def finish(
    hidden, weight, scores, reference, sums, targets, losses, inverse, scaled,
    tiles, rows, v, wide, depth, ignore_index, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From the sums the losses, inverse (rows,) = 1 / sum, scaled (rows, d) = hidden / sum, the target's score minus 1.

    Scores whose sum is above the limit may have overflowed, as they do where a target is less likely than 1e-30: they
    are computed anew, relative to the largest.
    """
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index)
    counts = target != ignore_index
    chosen = tl.load(reference + row, mask=inside, other=float("inf"))
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, COLUMNS):
        tile = start + columns
        mask = (tile < tiles)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums + tile.to(tl.int64)[:, None] * rows + row[None, :], mask=mask, other=0.0), 0)
    given = chosen
    if tl.max(total, 0) > limit:
        given = tl.full((ROWS,), float("-inf"), tl.float32)
        for start in range(0, v, COLUMNS):
            x = _logits(hidden, weight, row, rows, start + columns, v, depth, ROWS, COLUMNS, DEPTH)
            given = tl.maximum(given, tl.max(x, 1))
        given = tl.where(counts, given, float("inf"))
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, v, COLUMNS):
            x = _logits(hidden, weight, row, rows, start + columns, v, depth, ROWS, COLUMNS, DEPTH)
            powers = tl.where(counts[:, None], tl.exp2(x - given[:, None]), 0.0)
            total += tl.sum(powers, 1)
            if scores is not None:
                mask = inside[:, None] & (start + columns < v)[None, :]
                place = scores + row[:, None] * wide + (start + columns)[None, :]
                tl.store(place, powers.to(scores.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the target's score is written over by another thread
    tl.store(losses + row, tl.where(counts, (tl.log2(total) + (given - chosen)) * LN_2, 0.0), mask=inside)
    if scores is not None:
        score = tl.exp2(chosen - given) - total
        tl.store(scores + row * wide + target, score.to(scores.dtype.element_ty), mask=counts)
        scale = tl.where(counts, 1 / total, 0.0)
        tl.store(inverse + row, scale, mask=inside)
        for k in range(0, depth, DEPTH):
            inner = k + tl.arange(0, DEPTH)
            place = row[:, None] * depth + inner[None, :]
            mask = inside[:, None] & (inner < depth)[None, :]
            h = tl.where(counts[:, None], tl.load(hidden + place, mask=mask) * scale[:, None], 0.0)
            tl.store(scaled + place, h.to(scaled.dtype.element_ty), mask=mask)


@triton.jit
def divide(dhidden, inverse, tokens, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dhidden (t, d) by its rows' sums, in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(inverse + row, mask=row < tokens, other=0.0)
    for k in range(0, depth, COLUMNS):
        column = k + tl.arange(0, COLUMNS)
        place = dhidden + row.to(tl.int64)[:, None] * depth + column[None, :]
        mask = (row < tokens)[:, None] & (column < depth)[None, :]
        gradient = tl.load(place, mask=mask) * scale[:, None]
        tl.store(place, gradient.to(dhidden.dtype.element_ty), mask=mask)


@triton.jit
def _attend(h, w, columns, v, total_gradient, top, total, GRADIENT: tl.constexpr, MASK: tl.constexpr):
    """Take a tile of the vocabulary into the running maximum, sum and weighted sum of its vectors."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    x = tl.dot(h, w.T, input_precision="tf32x3")
    if MASK:
        x = tl.where((columns < v)[None, :], x, float("-inf"))
    highest = tl.maximum(top, tl.max(x, 1) * LOG2_E)
    powers = tl.exp2(x * LOG2_E - highest[:, None])
    rescale = tl.exp2(top - highest)
    total = total * rescale + tl.sum(powers, 1)
    if GRADIENT:
        total_gradient = total_gradient * rescale[:, None]
        total_gradient = tl.dot(powers.to(w.dtype), w, total_gradient, input_precision="tf32x3")
    return total_gradient, highest, total


@triton.jit
def hidden_gradient(
    hidden, weight, vectors, targets, losses, log_sums, dhidden, rows, v, depth, ignore_index,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of rows over the whole vocabulary, like attention whose keys and values are the weight's rows.

    losses and log_sums (rows,), the latter infinite where a position does not count; dhidden (rows, d).
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    first = tl.program_id(0) * ROWS
    h = hidden.load([first, 0])
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gradient = tl.zeros((ROWS, DEPTH), tl.float32)
    whole = v // COLUMNS * COLUMNS
    columns = tl.arange(0, COLUMNS)
    for column in range(0, whole, COLUMNS):
        w = weight.load([column, 0])
        gradient, top, total = _attend(h, w, column + columns, v, gradient, top, total, dhidden is not None, False)
    if whole < v:
        w = weight.load([whole, 0])
        gradient, top, total = _attend(h, w, whole + columns, v, gradient, top, total, dhidden is not None, True)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index).to(tl.int64)
    counts = target != ignore_index
    inner = tl.arange(0, DEPTH)
    mask = counts[:, None] & (inner < depth)[None, :]
    vector = tl.load(vectors + target[:, None] * depth + inner[None, :], mask=mask, other=0.0).to(tl.float32)
    log_sum = top + tl.log2(total)
    chosen = tl.sum(h.to(tl.float32) * vector, 1) * LOG2_E
    tl.store(losses + row, tl.where(counts, (log_sum - chosen) * LN_2, 0.0), mask=inside)
    if dhidden is not None:
        tl.store(log_sums + row, tl.where(counts, log_sum, float("inf")), mask=inside)
        gradient = tl.where(counts[:, None], gradient / total[:, None] - vector, 0.0)
        mask = inside[:, None] & (inner < depth)[None, :]
        place = row[:, None] * depth + inner[None, :]
        tl.store(dhidden + place, gradient.to(dhidden.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    hidden, weight, targets, log_sums, dweight, rows, v, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the vocabulary over all rows: dweight (v, d) float32."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    column = tl.program_id(0) * COLUMNS
    w = weight.load([column, 0])
    gradient = tl.zeros((COLUMNS, DEPTH), tl.float32)
    columns = column + tl.arange(0, COLUMNS)
    for row in range(0, rows, ROWS):
        h = hidden.load([row, 0])
        place = row + tl.arange(0, ROWS)
        log_sum = tl.load(log_sums + place, mask=place < rows, other=float("inf"))
        target = tl.load(targets + place, mask=place < rows, other=-1).to(tl.int32)
        target = tl.where(log_sum < float("inf"), target, -1)
        x = tl.dot(w, h.T, input_precision="tf32x3")
        share = tl.exp2(x * LOG2_E - log_sum[None, :])
        share = tl.where(target[None, :] == columns[:, None], share - 1, share)
        gradient = tl.dot(share.to(h.dtype), h, gradient, input_precision="tf32x3")
    inner = tl.arange(0, DEPTH)
    mask = (columns < v)[:, None] & (inner < depth)[None, :]
    tl.store(dweight + columns.to(tl.int64)[:, None] * depth + inner[None, :], gradient, mask=mask)
