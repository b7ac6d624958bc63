"""Linear layers on the CPU without gradients: every row gets the same bits, whatever rows it is computed with.

PyTorch's products, which training keeps, block by the number of rows and by the machine. These are as fast at thousands
of rows and, with weights that stream past once, faster at few.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import traced
from ..packed import Packed, Weight, unpacked
from .lanes import TILE_SHAPE, Tile, tile
from .memory import floats, located, new, paired
from .packed import ROWS, PackedTile, places, room, round_rows
from .run import apart, entry, exact, exact_kernel, inlined, run

COLUMNS = 16  # weight rows of a task
MULTIPLICATIONS = 8  # that take as long as one inner iteration of `WORTH_THREADS`
NEAR, FAR = 1 << 14, 1 << 19  # bytes of weights that stay in the first cache, and of rows in the second


Entries = tuple[int, int, int]
"""see `entries`"""


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moemamba.ops.linear`."""
    width_out, width_in = weight.shape
    if width_in * width_out == 0 or traced(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, unpacked(weight, x.dtype), bias)
    rows = x if x.ndim == 2 else x.reshape(-1, width_in)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, y = rows.shape[0], new(*x.shape[:-1], width_out)
    levels = new(count * room(width_in)) if isinstance(weight, Packed) else None
    places = located(rows[:0], *paired(weight), levels, bias, y)
    if places is None:
        return F.linear(x, unpacked(weight, x.dtype), bias)
    launch(count, width_in, width_out, rows.data_ptr(), 4 * rows.stride(0), *places[1:])
    return y


def launch(
    rows: int, width_in: int, width_out: int, x: int, x_step: int, weight: int, scale: int, levels: int, *places: int
) -> None:
    """A product over as many threads as it is worth. See `_linear` for what lies where."""
    work = rows * width_in * width_out // MULTIPLICATIONS
    if scale:
        cost = rows * width_in // MULTIPLICATIONS
        run(_round, -(-rows // ROWS), cost, entries(True), rows, width_in, x, x_step, levels)
    sizes = (rows, width_in, width_out, x, x_step, weight, scale, levels)
    run(_linear, -(-width_out // COLUMNS), work, entries(scale != 0), *sizes, *places)


@cache
def entries(of_8_bits: bool) -> Entries:
    """For `multiply` and `rounded`: what is for weights of 8 bits is compiled only where there are some."""
    return entry(_dense), *((entry(_packed), entry(round_rows)) if of_8_bits else (0, 0))


def products(tall: int, wide: int, kind: type[Tile] = Tile) -> Callable[..., None]:
    """A function for kernels, `product(first, last, rows, k, x, x_step, w, w_step, y, y_step, x_scale, w_scale)`:

    y[r, j] = sum over k of x[r, k] w[j, k] for all rows r and the weight rows j from first to last - 1. Addresses, and
    bytes from row to row. It takes tiles of up to `tall` rows and `wide` weights; results do not depend on that.
    Scales are those of `PackedTile`s, one for each row; float32 has none. `blocks` are for more than the caches hold.
    """
    highest, pair, single = (_strip(rows, wide, kind) for rows in (tall, 2, 1))

    @inlined
    def product(
        first: int,
        last: int,
        rows: int,
        k: int,
        x: int,
        x_step: int,
        w: int,
        w_step: int,
        y: int,
        y_step: int,
        x_scale: int,
        w_scale: int,
    ) -> None:
        row = 0
        while row + tall <= rows:
            here, there, scale = x + row * x_step, y + row * y_step, x_scale + 4 * row
            highest(first, last, k, here, x_step, w, w_step, there, y_step, scale, w_scale)
            row += tall
        if row + 2 <= rows:
            here, there, scale = x + row * x_step, y + row * y_step, x_scale + 4 * row
            pair(first, last, k, here, x_step, w, w_step, there, y_step, scale, w_scale)
            row += 2
        if row < rows:
            here, there, scale = x + row * x_step, y + row * y_step, x_scale + 4 * row
            single(first, last, k, here, x_step, w, w_step, there, y_step, scale, w_scale)

    return product


def _strip(rows: int, wide: int, kind: type[Tile]) -> Callable[..., None]:
    """A few rows against some weights, as tiles."""
    several, one = tile(rows, wide, kind), tile(rows, 1, kind)

    @inlined
    def strip(
        first: int,
        last: int,
        k: int,
        x: int,
        x_step: int,
        w: int,
        w_step: int,
        y: int,
        y_step: int,
        x_scale: int,
        w_scale: int,
    ) -> None:
        column = first
        while column + wide <= last:
            scale = w_scale + 4 * column
            several(k, x, x_step, w + column * w_step, w_step, y + 4 * column, y_step, x_scale, scale)
            column += wide
        while column < last:
            scale = w_scale + 4 * column
            one(k, x, x_step, w + column * w_step, w_step, y + 4 * column, y_step, x_scale, scale)
            column += 1

    return strip


def blocks(tall: int, wide: int, kind: type[Tile]) -> Callable[..., None]:
    """A function for kernels: a product, in blocks of weights and of rows that stay in the caches."""
    product = products(tall, wide, kind)
    of_x, of_w = kind.bytes_of_x, kind.bytes_of_w

    @inlined
    def blocked(
        first: int,
        last: int,
        rows: int,
        k: int,
        x: int,
        x_step: int,
        w: int,
        w_step: int,
        y: int,
        y_step: int,
        x_scale: int,
        w_scale: int,
    ) -> None:
        near = max(wide, NEAR // (of_w * max(k, 1)) // wide * wide)
        far = max(4 * tall, FAR // (of_x * max(k, 1)) // tall * tall)
        for row in range(0, rows, far):
            count = min(far, rows - row)
            here, there, scale = x + row * x_step, y + row * y_step, x_scale + 4 * row
            for start in range(first, last, near):
                end = min(last, start + near)
                product(start, end, count, k, here, x_step, w, w_step, there, y_step, scale, w_scale)

    return blocked


product = products(*TILE_SHAPE)
_blocks, _packed_blocks = blocks(*TILE_SHAPE, Tile), blocks(*TILE_SHAPE, PackedTile)


@apart(0)
def _dense(
    first: int, last: int, rows: int, k: int, x: int, x_step: int, w: int, w_step: int, y: int, y_step: int
) -> None:
    _blocks(first, last, rows, k, x, x_step, w, w_step, y, y_step, 0, 0)


@apart(1)
def _packed(
    first: int,
    last: int,
    begin: int,
    rows: int,
    count: int,
    k: int,
    levels: int,
    w: int,
    scale: int,
    y: int,
    y_step: int,
) -> None:
    """Of the `count` rounded rows those from `begin` on."""
    scales, step = places(levels, k, count)
    x, x_scale = levels + begin * step, scales + 4 * begin
    _packed_blocks(first, last, rows, k, x, step, w, k, y, y_step, x_scale, scale)


@exact
def multiply(
    at: Entries,
    first: int,
    last: int,
    begin: int,
    rows: int,
    count: int,
    k: int,
    x: int,
    x_step: int,
    w: int,
    scale: int,
    levels: int,
    y: int,
    y_step: int,
) -> None:
    """The product of rows from `begin` on with float32 weights. Those of 8 bits have a `scale`, and then `levels` are
    the `count` rows that there are, rounded by `rounded`. y is that of the first of these rows; see `entries`."""
    if scale:
        _packed(at, first, last, begin, rows, count, k, levels, w, scale, y, y_step)
    else:
        _dense(at, first, last, rows, k, x + begin * x_step, x_step, w, 4 * k, y, y_step)


@exact
def rounded(at: Entries, first: int, last: int, count: int, k: int, x: int, x_step: int, levels: int) -> None:
    """See `round_rows`."""
    round_rows(at, first, last, count, k, x, x_step, levels)


@exact_kernel
def _round(first: int, last: int, at: Entries, rows: int, k: int, x: int, x_step: int, levels: int) -> None:
    """Rows, ROWS a task."""
    rounded(at, first * ROWS, min(last * ROWS, rows), rows, k, x, x_step, levels)


@exact_kernel
def _linear(
    first: int,
    last: int,
    at: Entries,
    rows: int,
    width_in: int,
    width_out: int,
    x: int,
    x_step: int,
    weight: int,
    scale: int,
    levels: int,
    bias: int,
    y: int,
) -> None:
    """Columns of y, COLUMNS a task."""
    start, end = first * COLUMNS, min(last * COLUMNS, width_out)
    multiply(at, start, end, 0, rows, rows, width_in, x, x_step, weight, scale, levels, y, 4 * width_out)
    if bias:
        shift = floats(bias + 4 * start, end - start)
        for row in range(rows):
            out = floats(y + 4 * (row * width_out + start), end - start)
            for c in range(end - start):
                out[c] += shift[c]
