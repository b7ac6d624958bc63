"""Inside kernels: float32 arithmetic that LLVM vectorises, with the same bits wherever it stands."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .lanes import fma
from .run import exact

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
# 2^x = 1 + x p(x) on [-1/2, 1/2], fitted for the largest relative error: 9e-8, and exact at zero.
_P0, _P1, _P2, _P3, _P4 = map(
    np.float32,
    (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149),
)
# atanh(s) = s q(s²) / 2 on [0, 1/3]: 4e-9.
_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    np.float32, (2.0, 0.6666631698608398, 0.40024909377098083, 0.27960604429244995, 0.2817833423614502)
)


def instruction(argument: Any, result: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """A function for kernels that is a single LLVM instruction: `emit(builder, value)` writes it."""

    def describe(context: Any, x: Any) -> Any:
        return result(argument), lambda context, builder, signature, values: emit(builder, values[0])

    return intrinsic(describe)


FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)
nearest = instruction(
    types.float32, types.float32, lambda b, x: b.call(b.module.declare_intrinsic("llvm.nearbyint", [FLOAT]), [x])
)
_integer = instruction(types.float32, types.uint32, lambda b, x: b.fptosi(x, _INT32))
bits = instruction(types.float32, types.uint32, lambda b, x: b.bitcast(x, _INT32))
from_bits = instruction(types.uint32, types.float32, lambda b, x: b.bitcast(x, FLOAT))


@exact
def exp2(x: Any) -> Any:
    """2^x, flushed to 2^-126 and capped at 2^127; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    whole = nearest(x)
    x = x - whole
    p = fma(fma(fma(fma(fma(_P4, x, _P3), x, _P2), x, _P1), x, _P0), x, _ONE)
    return from_bits(bits(p) + (_integer(whole) << np.uint32(23)))


@exact
def sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + exp2(-LOG2E * x))


@exact
def softplus(x: Any) -> Any:
    """log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x|, and log(1 + y) = 2 atanh(y / (2 + y))."""
    y = exp2(-LOG2E * abs(x))
    s = y / (_TWO + y)
    q = s * s
    return fma(s, fma(fma(fma(fma(_Q4, q, _Q3), q, _Q2), q, _Q1), q, _Q0), max(x, _ZERO))


@exact
def silu(x: Any) -> Any:
    return x * sigmoid(x)


@exact
def gated(y: Any, z: Any) -> Any:
    """y silu(z)."""
    return y * silu(z)


@exact
def next_state(h: Any, step: Any, decay: Any, drive: Any, B: Any) -> Any:
    """A state after one position: 2^(step decay) h + drive B."""
    return fma(exp2(step * decay), h, drive * B)
