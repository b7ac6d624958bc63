"""Explicit vectors: products whose every rounding is fixed, whatever LLVM makes of the loops around them.

A sum over k is made of 16 lanes, of which lane i sums what stands at i, i + 16, i + 32 and so on, each by a chain of
fused multiply-adds that begins with zero; the lanes are added in a tree, first those eight apart, then four, two and
one. What is behind a last whole vector is read as zeros. So a sum depends on its two rows alone: not on what else is
computed at the same time, nor on the machine's registers.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # as many as the widest registers hold; others take two or four for one of these
_SIZE = 4 * LANES  # bytes
_AHEAD = 1 << 14  # bytes of weights between what is read and what is fetched
_SECOND = 2  # the cache that it is fetched to: memory answers it with more lines at a time than the first

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)


def _wide() -> bool:
    """Whether a register holds 16 numbers, and there are 32 of them."""
    try:
        return bool(llvm.get_host_cpu_features().get("avx512f"))
    except RuntimeError:  # not known on this machine
        return False


# Rows and weights of the largest tile: its sums have to stay in registers.
TILE_SHAPE = (4, 4) if _wide() else (2, 2)


def _fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of float32, rounded once."""

    def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.call(function(builder, "llvm.fma.f32", _FLOAT, _FLOAT, _FLOAT, _FLOAT), values)

    return types.float32(types.float32, types.float32, types.float32), emit


fma: Any = intrinsic(_fused)


def tile(rows: int, columns: int, kind: "type[Tile] | None" = None) -> Callable[..., None]:
    """A function for kernels: y[r, c] = sum over k of x[r, k] w[c, k] of so many rows of x and of weights.

    Its arguments are k, then address and bytes from row to row of x, of the weights and of y, and what its `kind` may
    ask for besides, float32's nothing. The weights that follow are fetched on the way.
    """

    @intrinsic
    def product(context: Any, *arguments: Any) -> Any:
        def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            (kind or Tile)(builder, rows, columns, *cgutils.unpack_tuple(builder, values[0])).write()
            return target.get_dummy_value()

        return types.void(types.StarArgTuple([types.int64] * len(arguments))), emit

    return product  # type: ignore[no-any-return]


class Tile:
    """The instructions of a `tile`: of float32, or of what a subclass reads."""

    vector, zeros = _VECTOR, _ZEROS  # a sum that is under way
    together, across = LANES, _SIZE  # numbers that are read at once, and bytes of so many weights
    bytes_of_x, bytes_of_w = 4, 4  # a number's

    def __init__(self, builder: Any, rows: int, columns: int, *values: Any):
        self.b, self.columns = builder, columns
        self.k, x, x_step, w, w_step, self.y, self.y_step, *self.besides = values
        self.x = [self._row(x, x_step, r) for r in range(rows)]
        self.w = [self._row(w, w_step, c) for c in range(columns)]

    def write(self) -> None:
        b = self.b
        whole = b.mul(b.sdiv(self.k, _INT64(self.together)), _INT64(self.across))  # bytes of weights in whole vectors
        sums = self._loop(whole, [self.zeros] * (len(self.x) * len(self.w)))
        self._store(self._tail(whole, sums))

    def read_x(self, row: Any, place: Any, inside: Any) -> Any:
        """A vector of a row of x; `place` counts bytes of weights, `inside` are the numbers that there are, or None."""
        return self._read(row, place, inside)

    def read_w(self, row: Any, place: Any, inside: Any) -> Any:
        """Likewise of a row of weights."""
        return self._read(row, place, inside)

    def add(self, x: Any, w: Any, total: Any) -> Any:
        """A sum with the products of a vector each."""
        return self.b.call(function(self.b, "llvm.fma.v16f32", *[_VECTOR] * 4), [x, w, total])

    def sum_lanes(self, vectors: list[Any]) -> Any:
        """The sum of the lanes of 1, 2, 4, 8 or 16 vectors, all in one."""
        return sum_lanes(self.b, vectors, self.b.fadd)

    def finish(self, totals: Any, row: int, column: int, count: int) -> Any:
        """What is written of so many sums of a row, from a column on."""
        return totals

    def _read(self, row: Any, place: Any, inside: Any) -> Any:
        pointer = self.b.inttoptr(self.b.add(row, place), _VECTOR.as_pointer())
        if inside is None:
            return self.b.load(pointer, align=4)
        return masked_load(self.b, pointer, inside, _VECTOR, 4)

    def _row(self, address: Any, step: Any, number: int) -> Any:
        return self.b.add(address, self.b.mul(step, _INT64(number))) if number else address

    def _loop(self, end: Any, start: list[Any]) -> list[Any]:
        """The sums over whole vectors."""
        b, before = self.b, self.b.block
        body, after = b.append_basic_block("vectors"), b.append_basic_block("summed")
        b.cbranch(b.icmp_signed(">", end, _INT64(0)), body, after)
        b.position_at_end(body)
        place, sums = b.phi(_INT64), [b.phi(self.vector) for _ in start]
        self._prefetch(place)
        more = self._add(sums, place, None)
        following = b.add(place, _INT64(self.across))
        for phi, first, next_ in zip([place, *sums], [_INT64(0), *start], [following, *more], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(next_, body)
        b.cbranch(b.icmp_signed("<", following, end), body, after)
        b.position_at_end(after)
        return [self._either(pair, before, body) for pair in zip(start, more, strict=True)]

    def _tail(self, place: Any, sums: list[Any]) -> list[Any]:
        """The sums with what is behind the last whole vector."""
        b, before, count = self.b, self.b.block, self.together
        left = b.trunc(b.and_(self.k, _INT64(count - 1)), _INT32)
        some, after = b.append_basic_block("rest"), b.append_basic_block("all")
        b.cbranch(b.icmp_signed(">", left, _INT32(0)), some, after)
        b.position_at_end(some)
        spread = b.insert_element(ir.Constant(ir.VectorType(_INT32, count), ir.Undefined), left, _INT32(0))
        spread = b.shuffle_vector(spread, spread, indices([0] * count))
        more = self._add(sums, place, b.icmp_signed("<", indices(range(count)), spread))
        b.branch(after)
        b.position_at_end(after)
        return [self._either(pair, before, some) for pair in zip(sums, more, strict=True)]

    def _add(self, sums: list[Any], place: Any, inside: Any) -> list[Any]:
        """The sums with one vector more of each row."""
        x = [self.read_x(row, place, inside) for row in self.x]
        w = [self.read_w(row, place, inside) for row in self.w]
        pairs = [(a, c) for a in x for c in w]
        return [self.add(a, c, total) for (a, c), total in zip(pairs, sums, strict=True)]

    def _prefetch(self, place: Any) -> None:
        byte = ir.IntType(8).as_pointer()
        fetch = function(self.b, "llvm.prefetch.p0", ir.VoidType(), byte, _INT32, _INT32, _INT32)
        for row in self.w:
            where = self.b.inttoptr(self.b.add(self.b.add(row, place), _INT64(_AHEAD)), byte)
            self.b.call(fetch, [where, _INT32(0), _INT32(_SECOND), _INT32(1)])

    def _store(self, sums: list[Any]) -> None:
        """Add the lanes of each sum, of up to 16 sums at a time, and write them row by row."""
        b, first = self.b, 0
        while first < len(sums):
            size = LANES
            while first + size > len(sums):
                size //= 2
            bits, apart = size.bit_length() - 1, LANES // size
            # What enters at v leaves in the lane whose number is v backwards: so that outputs stand side by side.
            entering = [int(f"{v:04b}"[::-1], 2) >> (4 - bits) for v in range(size)]
            totals = self.sum_lanes([sums[first + output] for output in entering])
            done = 0
            while done < size:
                row, column = divmod(first + done, self.columns)
                count = min(self.columns - column, size - done)
                place = b.add(self._row(self.y, self.y_step, row), _INT64(4 * column))
                own = b.shuffle_vector(totals, totals, indices([(done + output) * apart for output in range(count)]))
                kind = ir.VectorType(_FLOAT, count).as_pointer()
                b.store(self.finish(own, row, column, count), b.inttoptr(place, kind), align=4)
                done += count
            first += size

    def _either(self, values: tuple[Any, Any], *blocks: Any) -> Any:
        phi = self.b.phi(self.vector)
        for value, block in zip(values, blocks, strict=True):
            phi.add_incoming(value, block)
        return phi


def weighing(rows: int) -> Callable[..., None]:
    """A function for kernels: y[r, 0..15] += p[r, j] v[j, 0..15] for each j in order, by fused multiply-adds.

    Its arguments are how many j there are, at least one, then address and bytes from row to row of p, of v and of y.
    """

    @intrinsic
    def weigh(context: Any, count: Any, p: Any, p_step: Any, v: Any, v_step: Any, y: Any, y_step: Any) -> Any:
        def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            _weigh(builder, rows, *values)
            return target.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    return weigh  # type: ignore[no-any-return]


def _weigh(b: Any, rows: int, count: Any, p: Any, p_step: Any, v: Any, v_step: Any, y: Any, y_step: Any) -> None:
    fused = function(b, "llvm.fma.v16f32", *[_VECTOR] * 4)
    shares = [b.add(p, b.mul(p_step, _INT64(r))) for r in range(rows)]
    targets = [b.inttoptr(b.add(y, b.mul(y_step, _INT64(r))), _VECTOR.as_pointer()) for r in range(rows)]
    start, before = [b.load(target, align=4) for target in targets], b.block
    body, after = b.append_basic_block("values"), b.append_basic_block("weighed")
    b.branch(body)
    b.position_at_end(body)
    j, place, sums = b.phi(_INT64), b.phi(_INT64), [b.phi(_VECTOR) for _ in start]
    value, more = b.load(b.inttoptr(place, _VECTOR.as_pointer()), align=4), []
    for share, total in zip(shares, sums, strict=True):
        number = b.load(b.inttoptr(b.add(share, b.shl(j, _INT64(2))), _FLOAT.as_pointer()), align=4)
        spread = b.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _INT32(0))
        more.append(b.call(fused, [b.shuffle_vector(spread, spread, indices([0] * LANES)), value, total]))
    next_, further = b.add(j, _INT64(1)), b.add(place, v_step)
    for phi, first, following in zip([j, place, *sums], [_INT64(0), v, *start], [next_, further, *more], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, body)
    b.cbranch(b.icmp_signed("<", next_, count), body, after)
    b.position_at_end(after)
    for target, total in zip(targets, more, strict=True):
        b.store(total, target, align=4)


def sum_lanes(builder: Any, vectors: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sum of the lanes of 1, 2, 4, 8 or 16 vectors, all in one."""
    apart = LANES // 2
    while apart:
        added = []
        for i in range(0, len(vectors), 2):
            a, c = vectors[i], vectors[min(i + 1, len(vectors) - 1)]
            kept = [j + LANES * bool(j & apart) for j in range(LANES)]
            other = [(j ^ apart) + LANES * bool(j & apart) for j in range(LANES)]
            sides = (builder.shuffle_vector(a, c, indices(lanes)) for lanes in (kept, other))
            added.append(add(*sides))
        vectors, apart = added, apart // 2
    return vectors[0]


def indices(values: Any) -> Any:
    values = list(values)
    return ir.Constant(ir.VectorType(_INT32, len(values)), values)


def masked_load(builder: Any, pointer: Any, inside: Any, vector: Any, align: int) -> Any:
    """A vector of which only the lanes `inside` are read; the others are zeros."""
    kind = {"float": "f32", "i8": "i8"}[str(vector.element)]
    name = f"llvm.masked.load.v{vector.count}{kind}.p0"
    load = function(builder, name, vector, vector.as_pointer(), _INT32, inside.type, vector)
    return builder.call(load, [pointer, _INT32(align), inside, ir.Constant(vector, None)])


def function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """One of LLVM's own."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
