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
from .lanes import TILE_SHAPE, tile
from .memory import floats, located, new, paired
from .packed import ROWS, packed_product, room, round_rows
from .run import apart, entry, exact, exact_kernel, named, run

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


@cache
def products(tall: int, wide: int) -> Callable[..., None]:
    """A function for kernels, `product(first, last, rows, k, x, x_step, w, w_step, y, y_step)`:

    y[r, j] = sum over k of x[r, k] w[j, k] for all rows r and the weight rows j from first to last - 1. Addresses, and
    bytes from row to row. It takes tiles of up to `tall` rows and `wide` weights; results do not depend on that.
    `multiply` is for more than the caches hold.
    """
    highest, pair, single = (_strip(rows, wide) for rows in (tall, 2, 1))

    @exact
    @named(tall, wide)
    def product(
        first: int, last: int, rows: int, k: int, x: int, x_step: int, w: int, w_step: int, y: int, y_step: int
    ) -> None:
        row = 0
        while row + tall <= rows:
            highest(first, last, k, x + row * x_step, x_step, w, w_step, y + row * y_step, y_step)
            row += tall
        if row + 2 <= rows:
            pair(first, last, k, x + row * x_step, x_step, w, w_step, y + row * y_step, y_step)
            row += 2
        if row < rows:
            single(first, last, k, x + row * x_step, x_step, w, w_step, y + row * y_step, y_step)

    return product


def _strip(rows: int, wide: int) -> Callable[..., None]:
    """A few rows against some weights, as tiles."""
    several, one = tile(rows, wide), tile(rows, 1)

    @exact
    @named(rows, wide)
    def strip(first: int, last: int, k: int, x: int, x_step: int, w: int, w_step: int, y: int, y_step: int) -> None:
        column = first
        while column + wide <= last:
            several(k, x, x_step, w + column * w_step, w_step, y + 4 * column, y_step)
            column += wide
        while column < last:
            one(k, x, x_step, w + column * w_step, w_step, y + 4 * column, y_step)
            column += 1

    return strip


_TALL, _WIDE = TILE_SHAPE
product = products(_TALL, _WIDE)


@apart(0)
def _dense(
    first: int, last: int, rows: int, k: int, x: int, x_step: int, w: int, w_step: int, y: int, y_step: int
) -> None:
    """A product in blocks of weights and of rows that stay in the caches."""
    near, far = max(_WIDE, NEAR // (4 * k) // _WIDE * _WIDE), max(4 * _TALL, FAR // (4 * k) // _TALL * _TALL)
    for row in range(0, rows, far):
        count = min(far, rows - row)
        for start in range(first, last, near):
            end = min(last, start + near)
            product(start, end, count, k, x + row * x_step, x_step, w, w_step, y + row * y_step, y_step)


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
    packed_product(first, last, begin, rows, count, k, levels, w, scale, y, y_step)


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
