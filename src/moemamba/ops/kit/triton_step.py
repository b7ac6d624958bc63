# mypy: ignore-errors
"""What the Triton kernels of one decoded token share: how they are cut, norms, products of few rows, activations."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton import matrix, vector


class Cut(NamedTuple):
    """How a kernel is cut into the work of programs: rows of the batch, columns of its output, terms of a sum."""

    rows: int
    columns: int
    depth: int
    warps: int


def depth(how: Cut, length: int) -> dict[str, Any]:
    """How the sum over `length` is cut."""
    most = 32768 if how.warps > 4 else 8192  # weights that a program's registers hold
    size = max(16, min(how.depth, most // how.columns, triton.next_power_of_2(length)))
    return {"DEPTH": size, "CHUNKS": triton.cdiv(length, size), "DOT": how.rows > 1}


@triton.jit
def product(x, w, DOT: tl.constexpr):
    """x (ROWS, K) float32 times w (C, K) transposed: (ROWS, C) float32. Without DOT there is one row."""
    if DOT:
        out = tl.dot(x.to(w.dtype), tl.trans(w), input_precision="tf32x3")
    else:
        out = tl.sum(w.to(tl.float32) * x, 1)[None, :]
    return out


@triton.jit
def moments(x, rows, batch, d, eps, NORM: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean (zero for NORM 1, root mean square) and inverse deviation of each row."""
    column = tl.arange(0, DEPTH)
    mean = tl.zeros((rows.shape[0],), tl.float32)
    square = tl.zeros((rows.shape[0],), tl.float32)
    if NORM == 2:
        for c in tl.static_range(CHUNKS):
            mean += tl.sum(matrix(x, rows, batch, c * DEPTH + column, d).to(tl.float32), 1) / d
    for c in tl.static_range(CHUNKS):
        v = matrix(x, rows, batch, c * DEPTH + column, d).to(tl.float32) - mean[:, None]
        v = tl.where((c * DEPTH + column < d)[None, :], v, 0.0)
        square += tl.sum(v * v, 1) / d
    return mean, tl.rsqrt(square + eps)


@triton.jit
def normalised(x, rows, batch, column, d, mean, inverse, weight, bias, NORM: tl.constexpr):
    """Columns of some rows of x (batch, d) after the norm, rounded as x is, in float32; of NORM 0 x itself."""
    h = matrix(x, rows, batch, column, d).to(tl.float32)
    if NORM:
        h = (h - mean[:, None]) * inverse[:, None] * vector(weight, column, d)[None, :]
        if NORM == 2:
            h += vector(bias, column, d)[None, :]
        h = h.to(x.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def activated(a, b, ACTIVATION: tl.constexpr):
    """activation(a), times b for gated ones; see `ops.expert_feedforward`."""
    if ACTIVATION == "relu":
        a = tl.maximum(a, 0.0)
    elif ACTIVATION == "relu2":
        a = tl.maximum(a, 0.0)
        a = a * a
    elif ACTIVATION == "gelu":  # 1 + tanh(x) is 2 sigmoid(2x)
        a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif ACTIVATION == "silu":
        a = a * tl.sigmoid(a)
    elif ACTIVATION == "swiglu":
        a = a * tl.sigmoid(a) * b
    elif ACTIVATION == "gelu_erf":
        a = 0.5 * a * (1.0 + tl.erf(0.7071067811865476 * a))
    elif ACTIVATION == "geglu":
        a = 0.5 * a * (1.0 + tl.erf(0.7071067811865476 * a)) * b
    return a


@triton.jit
def ask_for(pointer, begin, size, LINES: tl.constexpr):
    """Bring LINES times 128 bytes, from element `begin` of `size` on, to the level-2 cache. Not in the interpreter."""
    place = begin + tl.arange(0, LINES) * (1024 // pointer.dtype.element_ty.primitive_bitwidth)
    where = pointer + tl.minimum(place, size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )
