"""Experts on the CPU without gradients, for any number of tokens: each has the bits that it has alone.

Choices are sorted by expert, so that each expert's matrices stream past once; what a token's experts return is added in
the order in which it chose them. What takes several threads is cut by columns, in three phases.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import (
    LOG2E,
    address,
    apart,
    entry,
    exact,
    exact_kernel,
    exp2,
    floats,
    fma,
    integers,
    located,
    named,
    new,
    paired,
    run,
    sigmoid,
    silu,
)
from ..kit.cpu.packed import ROWS, room_of
from ..kit.cpu.product import COLUMNS, MULTIPLICATIONS, Entries, entries, multiply, rounded
from ..kit.cpu.run import WORTH_THREADS
from ..kit.packed import Weight

LINEAR, _RELU, _GELU, _SILU, _RELU2, _GELU_ERF, _SWIGLU, _GEGLU = range(8)
ACTIVATIONS = {"relu": _RELU, "gelu": _GELU, "silu": _SILU, "relu2": _RELU2, "gelu_erf": _GELU_ERF}
ACTIVATIONS |= {"swiglu": _SWIGLU, "geglu": _GEGLU}
_GATED = _SWIGLU  # those from here on
_SORT, _FIRST, _ROUND, _SECOND, _PHASES = range(5)  # phases, of which weights of 8 bits alone have that of rounding
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_TWICE, _CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)  # 2 sqrt(2 / pi), and that of the tanh form
# erf x = 1 - (e1 t + ... + e5 t^5) exp(-x^2) with t = 1 / (1 + p x), to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
_SQRT_HALF, _P = np.float32(0.7071067811865476), np.float32(0.3275911)
_E1, _E2, _E3, _E4, _E5 = map(np.float32, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))

Parts = tuple[int, int, int, int]
"""see `_parts`"""
Sizes = tuple[int, int, int, int, int, int]
"""tokens, top_k, n_experts, d, width between the two matrices, width of the output"""


def experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    up: Weight | None,
    down: Weight,
    activation: int,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor | None:
    """`expert_feedforward` or, without `up`, `expert_linear`; None where the kernel cannot read what it is given."""
    n_experts, out, hidden = down.shape
    sizes = (*indices.shape, n_experts, x.shape[1], hidden, out)
    x = x.contiguous()  # bound here, lest it be freed before it is read
    work, y = new(space(sizes, activation, up, down)), new(x.shape[0], out)
    places = located(x, gates, *_matrices(up, down), up_bias, down_bias, work, y)
    if places is None or indices.dtype != torch.int64 or not indices.is_contiguous():
        return None
    launch(sizes, activation, False, indices.data_ptr(), *places)
    return y


def _matrices(up: Weight | None, down: Weight) -> tuple[Weight | None, ...]:
    """In the order of the kernel."""
    return *((None, None) if up is None else paired(up)), *paired(down)


def activated(x: Tensor, activation: int) -> Tensor | None:
    """An activation of x (..., f); None where the kernel cannot read it."""
    wide = x.shape[-1]
    width = wide // 2 if activation >= _GATED else wide
    y = new(*x.shape[:-1], width)
    places = located(x, y)
    if places is None or wide == 0:
        return None
    rows = x.numel() // wide
    run(
        _activated, rows, 16 * y.numel() // MULTIPLICATIONS, _parts(activation, False), wide, width, *places, space=wide
    )
    return y


def space(sizes: Sizes, activation: int, up: Weight | None, down: Weight) -> int:
    """Numbers that are kept on the way, integers counted as two."""
    tokens, top_k, n_experts, d, hidden, out = sizes
    between = _rows(hidden, activation)
    return 4 * (n_experts + 1) + out + tokens * top_k * (4 + d + between + out + room_of(max(d, hidden), up, down))


def launch(sizes: Sizes, activation: int, adds: bool, *places: int) -> None:
    """The experts over as many threads as that is worth. See `_experts` for what lies where."""
    tokens, top_k, _, d, hidden, out = sizes
    choices = tokens * top_k
    first = choices * d * _rows(hidden, activation) // MULTIPLICATIONS
    second = choices * hidden * out // MULTIPLICATIONS
    scales, biases = places[4] != 0 or places[6] != 0, places[7] != 0 or places[8] != 0
    at, within = entries(scales), _parts(activation, biases)
    if first + second < WORTH_THREADS or torch.get_num_threads() == 1:
        _experts(0, hidden + out + choices, at, within, _SORT, _PHASES, *sizes, activation, adds, *places)
        return
    for phase, tasks, cost in (
        (_SORT, 1, 0),
        (_FIRST, -(-hidden // COLUMNS), first),
        (_ROUND, -(-choices // ROWS), choices * hidden // MULTIPLICATIONS),
        (_SECOND, -(-out // COLUMNS), second),
    ):
        if activation != LINEAR or phase in (_SORT, _SECOND):
            run(_experts, tasks, cost, at, within, phase, phase + 1, *sizes, activation, adds, *places)


def prepare(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    up: Weight,
    down: Weight,
    activation: int,
    y: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Callable[[int], None] | None:
    """See `moemamba.ops.prepare_experts`."""
    (rows, top_k), (n_experts, out, hidden), d = indices.shape, down.shape, x.shape[1]
    work = new(space((rows, top_k, n_experts, d, hidden, out), activation, up, down))
    tensors = (x, gates, *_matrices(up, down), up_bias, down_bias, work, y)
    places, chosen = located(*tensors), address(indices, rows, top_k, dtype=torch.int64)
    if places is None:
        return None

    kept = (*tensors, indices)

    def step(live: int) -> None:
        assert kept  # and so are not freed
        launch((live, top_k, n_experts, d, hidden, out), activation, True, chosen, *places)

    return step


def _rows(hidden: int, activation: int) -> int:
    """Of the first matrix of an expert."""
    return 0 if activation == LINEAR else 2 * hidden if activation >= _GATED else hidden


@exact
def _gelu(x: Any) -> Any:
    """x (1 + erf(x / sqrt 2)) / 2."""
    z = abs(x) * _SQRT_HALF
    t = _ONE / fma(_P, z, _ONE)
    beyond = t * fma(fma(fma(fma(_E5, t, _E4), t, _E3), t, _E2), t, _E1) * exp2(-LOG2E * z * z)
    return x * _HALF * (_ONE + (_ONE - beyond if x > _ZERO else beyond - _ONE))


@cache
def _parts(activation: int, biases: bool) -> Parts:
    """For kernels, where the functions below are. What a layer does not have is not compiled."""
    activate = 0 if activation == LINEAR else entry(_activation(activation))
    return activate, entry(_sort), entry(_sum_choices), entry(_add) if biases else 0


# Loops begin at zero: numba takes other numbers for possibly negative, and counts those from the end, one by one.


@cache
def _activation(kind: int) -> Any:
    """A function for kernels: entries first .. last - 1 of a row, in place; gated ones are of its first `width`, times
    those behind them."""

    @apart(0)
    @named(kind)
    def activate(row: int, width: int, first: int, last: int) -> None:
        size = last - first
        x = floats(row + 4 * first, size)
        if kind == _RELU:
            for c in range(size):
                x[c] = _ZERO if x[c] < _ZERO else x[c]
        elif kind == _GELU:  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
            for c in range(size):
                x[c] = x[c] * sigmoid(_TWICE * fma(_CUBIC * x[c] * x[c], x[c], x[c]))
        elif kind == _SILU:
            for c in range(size):
                x[c] = silu(x[c])
        elif kind == _RELU2:
            for c in range(size):
                x[c] = _ZERO if x[c] < _ZERO else x[c] * x[c]
        elif kind == _GELU_ERF:
            for c in range(size):
                x[c] = _gelu(x[c])
        elif kind == _GEGLU:
            other = floats(row + 4 * (width + first), size)
            for c in range(size):
                x[c] = _gelu(x[c]) * other[c]
        else:
            other = floats(row + 4 * (width + first), size)
            for c in range(size):
                x[c] = silu(x[c]) * other[c]

    return activate


_activate = _activation(_RELU)  # for kernels, which call any of them, whose address they have


@exact_kernel
def _activated(first: int, last: int, row: int, within: Parts, wide: int, width: int, x: int, y: int) -> None:
    """Rows first .. last - 1; `row` is room for one."""
    own = floats(row, wide)
    for r in range(first, last):
        source, target = floats(x + 4 * wide * r, wide), floats(y + 4 * width * r, width)
        for c in range(wide):
            own[c] = source[c]
        _activate(within, row, width, 0, width)
        for c in range(width):
            target[c] = own[c]


@apart(1)
def _sort(indices: int, choices: int, n_experts: int, starts: int, filled: int, order: int, places: int) -> None:
    """Where each expert's choices start, the choices by expert, and the place of each, -1 of dropped ones. `filled` is
    room like that of `starts`, for one expert more than there are."""
    chosen, start, end = integers(indices, choices), integers(starts, n_experts + 1), integers(filled, n_experts + 1)
    sorted_, place = integers(order, choices), integers(places, choices)
    for e in range(n_experts + 1):
        start[e] = 0
    for choice in range(choices):
        if 0 <= chosen[choice] < n_experts:
            start[chosen[choice] + 1] += 1
    for e in range(n_experts):
        start[e + 1] += start[e]
    for e in range(n_experts):
        end[e] = start[e]
    for choice in range(choices):
        e = chosen[choice]
        place[choice] = -1
        if 0 <= e < n_experts:
            place[choice] = end[e]
            sorted_[end[e]] = choice
            end[e] += 1


@apart(2)
def _sum_choices(
    y: int, total: int, size: int, adds: int, gates: int, places: int, top_k: int, made: int, step: int
) -> None:
    """y = sum_j gates_j made[place_j] of one token, in the order of its choices, or y plus that; `step` bytes from row
    to row, and `total` is room for a row."""
    target, sums, place, shares = floats(y, size), floats(total, size), integers(places, top_k), floats(gates, top_k)
    for c in range(size):
        sums[c] = _ZERO
    for j in range(top_k):
        if place[j] >= 0:
            share, row = shares[j] if gates else _ONE, floats(made + place[j] * step, size)
            for c in range(size):
                sums[c] = fma(share, row[c], sums[c])
    if adds:
        for c in range(size):
            target[c] += sums[c]
    else:
        for c in range(size):
            target[c] = sums[c]


@exact
def _of_expert(e: int, weight: int, scale: int, rows: int, k: int) -> Any:
    """Where a matrix (rows, k) of a stack lies, and its scale."""
    return (weight + e * rows * k, scale + 4 * e * rows) if scale else (weight + 4 * e * rows * k, 0)


@apart(3)
def _add(row: int, shift: int, first: int, last: int) -> None:
    """To entries first .. last - 1 of a row those of a shift."""
    x, other = floats(row + 4 * first, last - first), floats(shift + 4 * first, last - first)
    for c in range(last - first):
        x[c] += other[c]


@exact_kernel
def _experts(
    first: int,
    last: int,
    at: Entries,
    within: Parts,
    begin_phase: int,
    end_phase: int,
    tokens: int,
    top_k: int,
    n_experts: int,
    d: int,
    hidden: int,
    out: int,
    activation: int,
    adds: bool,
    indices: int,
    x: int,
    gates: int,
    up: int,
    up_scale: int,
    down: int,
    down_scale: int,
    up_bias: int,
    down_bias: int,
    work: int,
    y: int,
) -> None:
    """A share of a phase, or all of some: sorting; the first matrices with the activation; the second, and the sums,
    added to y or not.

    Without `up` there is one matrix, and `hidden` is d. Matrices of 8 bits have a scale; what they read is rounded, in
    _SORT for the first and _ROUND for the second, whose shares are choices.
    """
    choices = tokens * top_k
    rows = 2 * hidden if activation >= _GATED else hidden if up else 0
    filled = work + 8 * (n_experts + 1)  # (n_experts + 1,) integers, as are those before, `starts`
    orders = filled + 8 * (n_experts + 1)  # (choices,) integers
    places = orders + 8 * choices  # (choices,) integers
    starts, order = integers(work, n_experts + 1), integers(orders, choices)
    sorted_ = places + 8 * choices  # (choices, d)
    between = sorted_ + 4 * choices * d  # (choices, rows)
    returned = between + 4 * choices * rows  # (choices, out)
    total = returned + 4 * choices * out  # (out,)
    levels = total + 4 * out  # (choices, room)
    for phase in range(begin_phase, end_phase):
        if phase == _SORT:
            _sort(within, indices, choices, n_experts, work, filled, orders, places)
            for j in range(starts[n_experts]):
                source, target = floats(x + 4 * d * (order[j] // top_k), d), floats(sorted_ + 4 * d * j, d)
                for c in range(d):
                    target[c] = source[c]
            if up_scale if up else down_scale:
                rounded(at, 0, starts[n_experts], choices, d, sorted_, 4 * d, levels)
        elif phase == _ROUND and up:
            if down_scale:
                rounded(
                    at,
                    first * ROWS,
                    min(last * ROWS, starts[n_experts]),
                    choices,
                    hidden,
                    between,
                    4 * rows,
                    levels,
                )
        elif phase == _FIRST and up:
            start, end = first * COLUMNS, min(last * COLUMNS, hidden)
            for e in range(n_experts):
                count, begin = starts[e + 1] - starts[e], starts[e]
                if count:
                    a, b = sorted_, between + 4 * begin * rows
                    w, scale = _of_expert(e, up, up_scale, rows, d)
                    multiply(at, start, end, begin, count, choices, d, a, 4 * d, w, scale, levels, b, 4 * rows)
                    if activation >= _GATED:
                        halves = hidden + start, hidden + end
                        multiply(at, *halves, begin, count, choices, d, a, 4 * d, w, scale, levels, b, 4 * rows)
                    for j in range(count):
                        row = b + 4 * j * rows
                        if up_bias:
                            shift = up_bias + 4 * e * rows
                            _add(within, row, shift, start, end)
                            if activation >= _GATED:
                                _add(within, row, shift, hidden + start, hidden + end)
                        _activate(within, row, hidden, start, end)
        elif phase == _SECOND:
            start, end = first * COLUMNS, min(last * COLUMNS, out)
            source_rows, step = (between, 4 * rows) if up else (sorted_, 4 * d)
            for e in range(n_experts):
                count, begin = starts[e + 1] - starts[e], starts[e]
                if count:
                    a, b = source_rows, returned + 4 * begin * out
                    w, scale = _of_expert(e, down, down_scale, out, hidden)
                    multiply(at, start, end, begin, count, choices, hidden, a, step, w, scale, levels, b, 4 * out)
                    for j in range(count if down_bias else 0):
                        _add(within, b + 4 * j * out, down_bias + 4 * e * out, start, end)
            for token in range(tokens):
                first_choice = token * top_k
                shares = gates + 4 * first_choice if gates else 0
                target, mine = y + 4 * (out * token + start), places + 8 * first_choice
                made, sums = returned + 4 * start, total + 4 * start
                _sum_choices(within, target, sums, end - start, adds, shares, mine, top_k, made, 4 * out)
