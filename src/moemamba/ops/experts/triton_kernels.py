"""The kernels of `triton.py`: products of tiles of sorted rows with their expert's matrix.

Operands are read through tensor descriptors (the tensor memory accelerator on Hopper), which give zeros beyond an edge,
so no product masks anything; float32 operands are multiplied as three products of tf32 parts. The programs of the
products are persistent: one tile's epilogue runs while the next one's operands are loaded, and works on half of the
columns at a time to leave shared memory to them.

Letters besides the usual: p pairs (t * k), r rows (see `triton_sort.py`), g 2 for "swiglu" (gate and up halves of the
first product), otherwise 1.
"""

import triton
import triton.language as tl

from ..kit.triton import halves

WORDS = tl.constexpr(8)  # of signs a row and column tile
TINY = tl.constexpr(2.0**-64)


@triton.jit
def gather(
    x, gates, out, order, tile_experts, bounds, n_experts, top_k, width, out_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[row] = x[token of row], with gates times `_no_zero` of its gate; zeros where rows fill up."""
    if tl.program_id(0) * ROWS >= tl.load(bounds + 2 * n_experts):  # the rows of dropped pairs, and what is unused
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.load(order + rows)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (pairs >= 0)[:, None] & (columns < width)[None, :]
    values = tl.load(x + (pairs // top_k).to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    place = rows.to(tl.int64)[:, None] * out_width + columns[None, :]
    if gates is not None:
        values = (values * _no_zero(_gates(gates, pairs))).to(out.dtype.element_ty)
    tl.store(out + place, values, mask=(columns < out_width)[None, :])


@triton.jit
def sum_choices(pairs, out, tokens, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[token] = sum of its K pairs."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < tokens) & (columns < width)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        total += tl.load(pairs + (rows * K + k) * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * width + columns, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _no_zero(gates):
    """Gates that can be divided by: what is nearer to zero than TINY becomes it, and is as good as zero elsewhere."""
    return tl.where(tl.abs(gates) < TINY, TINY, gates)


@triton.jit
def _pack(x, FIRST: tl.constexpr):
    """Bits from FIRST on of WORDS words a row, set where x > 0.

    Columns eight apart share a word: in the layout of a product's accumulators they are those of one thread.
    """
    SHARE: tl.constexpr = x.shape[1] // WORDS
    bits = (x > 0).to(tl.int32).reshape(x.shape[0], SHARE, WORDS)
    place = tl.arange(0, SHARE) + FIRST
    return tl.sum(bits << place[None, :, None], 1)


@triton.jit
def _unpack(words, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Where what `_pack` was given is positive."""
    SHARE: tl.constexpr = WIDTH // WORDS
    place = tl.arange(0, SHARE) + FIRST
    bits = (words[:, None, :] >> place[None, :, None]) & 1
    return (bits != 0).reshape(words.shape[0], WIDTH)


@triton.jit
def _words(signs, row, tile, across, ROWS: tl.constexpr):
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    return signs + (rows[:, None] * across + tile) * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """activation(x) and its slope."""
    if ACTIVATION == "relu":
        value, slope = tl.maximum(x, 0.0), (x > 0).to(tl.float32)
    elif ACTIVATION == "gelu":  # x sigmoid(2 u) is the tanh approximation
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value, slope = x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:  # silu, also the gate of swiglu
        s = tl.sigmoid(x)
        value, slope = x * s, s + x * s * (1 - s)
    return value, slope


@triton.jit
def first_product(
    x, weight, hidden, before, signs, tile_experts, bounds, n_experts, depth, width,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """hidden (r, f) = activation(x (r, d) @ weight[expert] (g, f, d)); also `before` it (r, g, f), or its `signs`."""
    GROUPS: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    HALF: tl.constexpr = COLUMNS // 2
    across = tl.cdiv(width, COLUMNS // GROUPS)
    tiles = tl.load(bounds + 2 * n_experts) // ROWS * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = tile // across * ROWS
        column = tile % across * (COLUMNS // GROUPS)
        expert = tl.load(tile_experts + tile // across)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            w = weight.load([expert, 0, column, k]).reshape(COLUMNS, DEPTH)
            product = tl.dot(x.load([row, k]), w.T, product, input_precision="tf32x3")
        left, right = halves(product)
        if ACTIVATION == "swiglu":  # the weights' tile holds rows of the gate, then the same rows of up
            before.store([row, 0, column], left.to(before.dtype).reshape(ROWS, 1, HALF))
            before.store([row, 1, column], right.to(before.dtype).reshape(ROWS, 1, HALF))
            hidden.store([row, column], (_activate(left, ACTIVATION)[0] * right).to(hidden.dtype))
        else:
            if before is not None:
                before.store([row, 0, column], left.to(before.dtype).reshape(ROWS, 1, HALF))
                before.store([row, 0, column + HALF], right.to(before.dtype).reshape(ROWS, 1, HALF))
            hidden.store([row, column], _activate(left, ACTIVATION)[0].to(hidden.dtype))
            if signs is not None:  # here, while the left half leaves shared memory
                tl.store(_words(signs, row, tile % across, across, ROWS), _pack(left, 0) | _pack(right, HALF // WORDS))
            hidden.store([row, column + HALF], _activate(right, ACTIVATION)[0].to(hidden.dtype))


@triton.jit
def _gates(gates, pairs):
    """The pairs' gates as a column; one without gates."""
    if gates is None:
        column = tl.full((pairs.shape[0], 1), 1.0, tl.float32)
    else:
        column = tl.load(gates + pairs, mask=pairs >= 0, other=0.0)[:, None]
    return column


@triton.jit
def _scatter(product, out, pairs, column, width):
    columns = column + tl.arange(0, product.shape[1])
    place = pairs.to(tl.int64)[:, None] * width + columns[None, :]
    mask = (pairs >= 0)[:, None] & (columns < width)[None, :]
    tl.store(out + place, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def last_product(
    x, weight, out, gates, inputs, dgates, order, tile_experts, bounds, n_pairs, n_experts, depth, width,
    TRANSPOSED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[pair] = gate * x[row] @ weight[expert], (n, k) or TRANSPOSED (k, n); zero for a dropped pair.

    With `inputs` (r, n), also d(gate), the product before its gate times them; dgates (n tiles, p) are partial.
    GATED: x has the gate in it already, so that d(gate) takes it out again.
    """
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.load(bounds + 2 * n_experts + 2) // ROWS * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = tile // across * ROWS
        column = tile % across * COLUMNS
        expert = tl.load(tile_experts + tile // across)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            if TRANSPOSED:
                w = weight.load([expert, k, column]).reshape(DEPTH, COLUMNS)
            else:
                w = weight.load([expert, column, k]).reshape(COLUMNS, DEPTH).T
            product = tl.dot(x.load([row, k]), w, product, input_precision="tf32x3")
        product = tl.where(
            expert < n_experts, product, 0.0
        )  # the rows of dropped pairs hold anything, x and inputs too
        pairs = tl.load(order + row + tl.arange(0, ROWS))
        left, right = halves(product)
        gate = _gates(gates, pairs)
        if dgates is not None:
            share = tl.sum(left * inputs.load([row, column]), 1)
            share += tl.sum(right * inputs.load([row, column + COLUMNS // 2]), 1)
            if GATED:
                share /= tl.sum(_no_zero(gate), 1)
            share = tl.where(expert < n_experts, share, 0.0)
            tl.store(dgates + (tile % across).to(tl.int64) * n_pairs + pairs, share, mask=pairs >= 0)
        if not GATED:
            left, right = left * gate, right * gate
        _scatter(left, out, pairs, column, width)
        _scatter(right, out, pairs, column + COLUMNS // 2, width)


@triton.jit
def _activation_backward(product, gate, before, dbefore, hidden, row, column, ACTIVATION: tl.constexpr):
    """From d(hidden) before the gate: d(before), hidden again times its gate, and this half of d(gate)."""
    ROWS: tl.constexpr = product.shape[0]
    HALF: tl.constexpr = product.shape[1]
    a = before.load([row, 0, column]).reshape(ROWS, HALF).to(tl.float32)
    if ACTIVATION == "swiglu":
        b = before.load([row, 1, column]).reshape(ROWS, HALF).to(tl.float32)
        value, slope = _activate(a, ACTIVATION)
        db = product * value * gate
        dbefore.store([row, 1, column], db.to(dbefore.dtype).reshape(ROWS, 1, HALF))
        value, da = value * b, product * b * slope
    else:
        value, slope = _activate(a, ACTIVATION)
        da = product * slope
    dbefore.store([row, 0, column], (da * gate).to(dbefore.dtype).reshape(ROWS, 1, HALF))
    hidden.store([row, column], (value * gate).to(hidden.dtype))
    return tl.sum(product * value, 1)


@triton.jit
def last_product_backward(
    dy, weight, before, signs, dbefore, hidden, gates, dgates,
    order, tile_experts, bounds, n_pairs, n_experts, depth, width,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """d(hidden) = dy (r, o) @ weight[expert] (o, f), then `_activation_backward`; dgates (f tiles, p) are partial.

    With `signs` dy has the gates in it, and where x was positive is all that remains to be asked.
    """
    HALF: tl.constexpr = COLUMNS // 2
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.load(bounds + 2 * n_experts) // ROWS * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = tile // across * ROWS
        column = tile % across * COLUMNS
        expert = tl.load(tile_experts + tile // across)
        if signs is not None:  # here, so that it comes while the product is made
            words = tl.load(_words(signs, row, tile % across, across, ROWS))
        else:
            pairs = tl.load(order + row + tl.arange(0, ROWS))
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            w = weight.load([expert, k, column]).reshape(DEPTH, COLUMNS)
            product = tl.dot(dy.load([row, k]), w, product, input_precision="tf32x3")
        left, right = halves(product)
        if signs is not None:
            left = tl.where(_unpack(words, 0, HALF), left, 0.0)
            right = tl.where(_unpack(words, HALF // WORDS, HALF), right, 0.0)
            dbefore.store([row, 0, column], left.to(dbefore.dtype).reshape(ROWS, 1, HALF))
            dbefore.store([row, 0, column + HALF], right.to(dbefore.dtype).reshape(ROWS, 1, HALF))
        else:
            gate = _gates(gates, pairs)
            share = _activation_backward(left, gate, before, dbefore, hidden, row, column, ACTIVATION)
            share += _activation_backward(right, gate, before, dbefore, hidden, row, column + HALF, ACTIVATION)
            if gates is not None:
                place = (tile % across).to(tl.int64) * n_pairs + pairs
                tl.store(dgates + place, share, mask=pairs >= 0)


@triton.jit
def weight_gradient(
    dy, x, dweight, bounds, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dweight[expert] (n, k) = sum of dy[row] (n) x[row] (k) over the expert's rows."""
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    top, left = tile // across * ROWS, tile % across * COLUMNS
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(tl.load(bounds + 2 * expert), tl.load(bounds + 2 * expert + 1), DEPTH):
        product = tl.dot(dy.load([row, top]).T, x.load([row, left]), product, input_precision="tf32x3")
    rows = top + tl.arange(0, ROWS)
    columns = left + tl.arange(0, COLUMNS)
    place = (expert.to(tl.int64) * height + rows[:, None]) * width + columns[None, :]
    tl.store(dweight + place, product.to(dweight.dtype.element_ty), mask=(rows < height)[:, None] & (columns < width))
