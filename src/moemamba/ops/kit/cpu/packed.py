"""Products with weights of 8 bits: rows are rounded to whole numbers too, of 16 bits, and summed as such.

A row of x becomes multiples of its largest entry over `levels(k)`, which is 32,767, or for rows of more than 516
entries as many as 32 bits can sum. Sums of whole numbers are exact, in any order: a result depends on its two rows
alone, whatever the machine. The rounding of x costs some 1/65,000 of its largest entry, that of the weights 1/254.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..packed import Packed, Weight
from .arithmetic import bits, from_bits, nearest
from .lanes import LANES, TILE_SHAPE, Tile, function, indices, masked_load, sum_lanes
from .memory import floats, shorts
from .run import apart, exact, named

TOGETHER = 2 * LANES  # numbers that are read at once: rounded rows are filled up with zeros to a multiple
ROWS = 16  # of a task of rounding

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_BYTES, _SHORTS = ir.VectorType(ir.IntType(8), TOGETHER), ir.VectorType(ir.IntType(16), TOGETHER)
_SUMS = ir.VectorType(_INT32, LANES)
_ZERO, _SMALLEST = np.float32(0), np.float32(1e-30)
_NO_SIGN, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


def _products_of_pairs() -> str:
    """The instruction that multiplies 16-bit numbers and adds them by twos, if this machine has one."""
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # not known on this machine
        return ""
    return next((name for name in ("avx512bw", "avx2") if features.get(name)), "")


_PAIRS = _products_of_pairs()


class _Tile(Tile):
    """Of rounded rows and weights of 8 bits; y is made of the sums by what both are multiples of."""

    vector, zeros = _SUMS, ir.Constant(_SUMS, None)
    together, across = TOGETHER, TOGETHER

    def __init__(self, builder: Any, rows: int, columns: int, *values: Any):
        *others, self.x_scale, self.w_scale = values
        super().__init__(builder, rows, columns, *others)

    def read_x(self, row: Any, place: Any, inside: Any) -> Any:
        where = self.b.add(row, self.b.shl(place, _INT64(1)))
        return self.b.load(self.b.inttoptr(where, _SHORTS.as_pointer()), align=2)  # behind the last there are zeros

    def read_w(self, row: Any, place: Any, inside: Any) -> Any:
        pointer = self.b.inttoptr(self.b.add(row, place), _BYTES.as_pointer())
        if inside is None:
            return self.b.sext(self.b.load(pointer, align=1), _SHORTS)
        return self.b.sext(masked_load(self.b, pointer, inside, _BYTES, 1), _SHORTS)

    def add(self, x: Any, w: Any, total: Any) -> Any:
        b = self.b
        if _PAIRS == "avx512bw":
            return b.add(total, b.call(function(b, "llvm.x86.avx512.pmaddw.d.512", _SUMS, _SHORTS, _SHORTS), [x, w]))
        if _PAIRS == "avx2":
            half, sums = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(_INT32, LANES // 2)
            pairs = function(b, "llvm.x86.avx2.pmadd.wd", sums, half, half)
            parts = [indices(range(start, start + LANES)) for start in (0, LANES)]
            low, high = (b.call(pairs, [b.shuffle_vector(v, v, part) for v in (x, w)]) for part in parts)
            return b.add(total, b.shuffle_vector(low, high, indices(range(LANES))))
        wide = ir.VectorType(_INT32, TOGETHER)
        products = b.mul(b.sext(x, wide), b.sext(w, wide))
        halves = [b.shuffle_vector(products, products, indices(range(s, s + LANES))) for s in (0, LANES)]
        return b.add(total, b.add(*halves))

    def sum_lanes(self, vectors: list[Any]) -> Any:
        return sum_lanes(self.b, vectors, self.b.add)

    def finish(self, totals: Any, row: int, column: int, count: int) -> Any:
        b, vector = self.b, ir.VectorType(_FLOAT, count)
        share = b.load(b.inttoptr(b.add(self.x_scale, _INT64(4 * row)), _FLOAT.as_pointer()), align=4)
        spread = b.insert_element(ir.Constant(vector, ir.Undefined), share, _INT32(0))
        spread = b.shuffle_vector(spread, spread, indices([0] * count))
        scale = b.load(b.inttoptr(b.add(self.w_scale, _INT64(4 * column)), vector.as_pointer()), align=4)
        return b.fmul(b.fmul(b.sitofp(totals, vector), spread), scale)


def _tile(rows: int, columns: int) -> Callable[..., None]:
    @intrinsic
    def product(
        context: Any, k: Any, x: Any, x_step: Any, w: Any, w_step: Any, y: Any, y_step: Any, x_scale: Any, w_scale: Any
    ) -> Any:
        def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            _Tile(builder, rows, columns, *values).write()
            return target.get_dummy_value()

        return types.void(*[types.int64] * 9), emit

    return product  # type: ignore[no-any-return]


def room(k: int) -> int:
    """Numbers of 4 bytes that a rounded row of k takes, with what it is multiplied by."""
    return (k + TOGETHER - 1) // TOGETHER * LANES + 1


def room_of(k: int, *weights: Weight | None) -> int:
    """That of rows which one of these weights multiplies: none where none of them has 8 bits."""
    return room(k) if any(isinstance(weight, Packed) for weight in weights) else 0


@exact
def _places(levels: int, k: int, count: int) -> Any:
    """Of `count` rounded rows: where what they are multiplied by lies, and the bytes from row to row."""
    step = (k + TOGETHER - 1) // TOGETHER * TOGETHER * 2
    return levels + count * step, step


@apart
def round_rows(first: int, last: int, count: int, k: int, x: int, x_step: int, levels: int) -> None:
    """Round rows first .. last - 1 of `count`, of k entries each, into `levels` (count * `room(k)`)."""
    scales, step = _places(levels, k, count)
    most = np.float32(min(32767, 2147483647 // (127 * max(k, 1))))
    for row in range(first, last):
        source, target = floats(x + row * x_step, k), shorts(levels + row * step, step // 2)
        scale = floats(scales + 4 * row, 1)
        largest = np.uint32(0)
        for c in range(k):
            largest = max(largest, bits(source[c]) & _NO_SIGN)  # as whole numbers they have the same order
        top = from_bits(largest)
        share = most / top if largest < _INFINITE and top >= _SMALLEST else _ZERO
        scale[0] = top / most if share > _ZERO else top - top  # of what is not finite it is not a number
        for c in range(step // 2):
            target[c] = np.int16(0)
        if share > _ZERO:
            for c in range(k):
                target[c] = np.int16(np.int32(nearest(source[c] * share)))


@cache
def packed_products(tall: int, wide: int) -> Callable[..., None]:
    """A function for kernels: as `products`, of rounded rows (`levels`, all `count` of them, from row `begin` on) and
    weights of 8 bits."""
    tiles = {(rows, columns): _tile(rows, columns) for rows in (tall, 2, 1) for columns in (wide, 1)}

    def strip(rows: int) -> Callable[..., None]:
        several, one = tiles[rows, wide], tiles[rows, 1]

        @exact
        @named(rows, wide)
        def across(
            first: int, last: int, k: int, x: int, x_step: int, w: int, y: int, y_step: int, x_scale: int, w_scale: int
        ) -> None:
            c = first
            while c + wide <= last:
                several(k, x, x_step, w + c * k, k, y + 4 * c, y_step, x_scale, w_scale + 4 * c)
                c += wide
            while c < last:
                one(k, x, x_step, w + c * k, k, y + 4 * c, y_step, x_scale, w_scale + 4 * c)
                c += 1

        return across

    highest, pair, single = strip(tall), strip(2), strip(1)

    @exact
    @named(tall, wide)
    def product(
        first: int,
        last: int,
        begin: int,
        rows: int,
        count: int,
        k: int,
        levels: int,
        w: int,
        w_scale: int,
        y: int,
        y_step: int,
    ) -> None:
        scales, step = _places(levels, k, count)
        near, far = max(wide, 16384 // max(k, 1) // wide * wide), max(4 * tall, 262144 // max(k, 1) // tall * tall)
        for top in range(0, rows, far):
            bottom = min(rows, top + far)
            for start in range(first, last, near):
                end, row = min(last, start + near), top
                while row + tall <= bottom:
                    here, share = levels + (begin + row) * step, scales + 4 * (begin + row)
                    highest(start, end, k, here, step, w, y + row * y_step, y_step, share, w_scale)
                    row += tall
                if row + 2 <= bottom:
                    here, share = levels + (begin + row) * step, scales + 4 * (begin + row)
                    pair(start, end, k, here, step, w, y + row * y_step, y_step, share, w_scale)
                    row += 2
                if row < bottom:
                    here, share = levels + (begin + row) * step, scales + 4 * (begin + row)
                    single(start, end, k, here, step, w, y + row * y_step, y_step, share, w_scale)

    return product


packed_product = packed_products(*TILE_SHAPE)
