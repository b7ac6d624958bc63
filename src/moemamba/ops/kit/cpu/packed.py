"""Products with weights of 8 bits: rows are rounded to whole numbers too, of 16 bits, and summed as such.

A row of x becomes multiples of its largest entry over `levels(k)`, which is 32,767, or for rows of more than 516
entries as many as 32 bits can sum. Sums of whole numbers are exact, in any order: a result depends on its two rows
alone, whatever the machine. The rounding of x costs some 1/65,000 of its largest entry, that of the weights 1/254.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from ..packed import Packed, Weight
from .arithmetic import bits, from_bits, nearest
from .lanes import LANES, Tile, function, indices, masked_load, sum_lanes
from .memory import floats, shorts
from .run import apart, exact

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


class PackedTile(Tile):
    """Of rounded rows and weights of 8 bits; y is made of the sums by what both are multiples of, whose addresses come
    besides."""

    vector, zeros = _SUMS, ir.Constant(_SUMS, None)
    together, across = TOGETHER, TOGETHER
    bytes_of_x, bytes_of_w = 2, 1

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
        b, vector, (x_scale, w_scale) = self.b, ir.VectorType(_FLOAT, count), self.besides
        share = b.load(b.inttoptr(b.add(x_scale, _INT64(4 * row)), _FLOAT.as_pointer()), align=4)
        spread = b.insert_element(ir.Constant(vector, ir.Undefined), share, _INT32(0))
        spread = b.shuffle_vector(spread, spread, indices([0] * count))
        scale = b.load(b.inttoptr(b.add(w_scale, _INT64(4 * column)), vector.as_pointer()), align=4)
        return b.fmul(b.fmul(b.sitofp(totals, vector), spread), scale)


def room(k: int) -> int:
    """Numbers of 4 bytes that a rounded row of k takes, with what it is multiplied by."""
    return (k + TOGETHER - 1) // TOGETHER * LANES + 1


def room_of(k: int, *weights: Weight | None) -> int:
    """That of rows which one of these weights multiplies: none where none of them has 8 bits."""
    return room(k) if any(isinstance(weight, Packed) for weight in weights) else 0


@exact
def places(levels: int, k: int, count: int) -> Any:
    """Of `count` rounded rows: where what they are multiplied by lies, and the bytes from row to row."""
    step = (k + TOGETHER - 1) // TOGETHER * TOGETHER * 2
    return levels + count * step, step


@apart(2)
def round_rows(first: int, last: int, count: int, k: int, x: int, x_step: int, levels: int) -> None:
    """Round rows first .. last - 1 of `count`, of k entries each, into `levels` (count * `room(k)`)."""
    scales, step = places(levels, k, count)
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
