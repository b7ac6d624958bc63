# mypy: ignore-errors
"""Experts of a few tokens on the GPU: each (token, choice) reads the rows of its expert; nothing is sorted.

For decoding: two kernels, and no more than the chosen experts' weights are read. No gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.triton import launch, overlap, ready

FEW = 32  # choices up to which this is used: beyond, experts chosen more than once are better read once
WEIGHTS = 8192  # that a program holds at once


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""
    (tokens, top_k), (n_experts, o, f), d = indices.shape, down.shape, x.shape[1]
    x, indices, up, down = x.contiguous(), indices.contiguous(), up.contiguous(), down.contiguous()
    gates = None if gates is None else gates.contiguous()
    hidden, y = x.new_empty(tokens * top_k, f), x.new_empty(tokens, o)
    sizes = (n_experts, top_k, d, f, o)
    columns, pdl = 8 if activation == "swiglu" else 16, overlap(x)
    first_kernel[(triton.cdiv(f, columns), tokens * top_k)](
        x, indices, up, hidden, *sizes, ACTIVATION=activation, C=columns, **_depth(d, columns), **launch(4, pdl)
    )
    last_kernel[(triton.cdiv(o, 4), tokens)](
        hidden, indices, gates, down, y, *sizes, C=4, **_depth(f, 4), **launch(4, pdl)
    )  # fmt: skip
    return y


def fits(x: Tensor, indices: Tensor) -> bool:
    """Whether these tokens are few, and nothing asks for gradients or is compiled."""
    return 0 < indices.numel() <= FEW and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _depth(length: int, columns: int) -> dict[str, int]:
    depth = min(WEIGHTS // columns, triton.next_power_of_2(length))
    return {"DEPTH": depth, "CHUNKS": triton.cdiv(length, depth)}


@triton.jit
def _rows(pointer, first, row, rows, column, columns):
    """Rows of a matrix that begins `first` rows into a stack of them, in float32."""
    where = pointer + (first + row[:, None]) * columns + column[None, :]
    return tl.load(where, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def first_kernel(
    x, indices, up, hidden, n_experts, top_k, d, f, o,
    ACTIVATION: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C hidden features of one choice."""
    ready(PDL)
    pair = tl.program_id(1)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    expert = tl.load(indices + pair).to(tl.int64)
    if expert < n_experts:
        GROUPS: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
        a = tl.zeros((C,), tl.float32)
        b = tl.zeros((C,), tl.float32)
        for c in tl.static_range(CHUNKS):
            column = c * DEPTH + tl.arange(0, DEPTH)
            v = tl.load(x + (pair // top_k).to(tl.int64) * d + column, mask=column < d, other=0.0).to(tl.float32)
            a += tl.sum(_rows(up, expert * (GROUPS * f), feature, f, column, d) * v[None, :], 1)
            if GROUPS == 2:
                b += tl.sum(_rows(up, expert * (GROUPS * f) + f, feature, f, column, d) * v[None, :], 1)
        if ACTIVATION == "relu":
            a = tl.maximum(a, 0.0)
        elif ACTIVATION == "gelu":  # 1 + tanh(x) is 2 sigmoid(2x)
            a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        else:
            a = a * tl.sigmoid(a)
            if GROUPS == 2:
                a = a * b
        tl.store(hidden + pair.to(tl.int64) * f + feature, a, mask=feature < f)


@triton.jit
def last_kernel(
    hidden, indices, gates, down, y, n_experts, top_k, d, f, o,
    C: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C output features of one token, over its choices; a dropped one has no hidden features."""
    ready(PDL)
    token = tl.program_id(1)
    feature = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        expert = tl.load(indices + pair).to(tl.int64)
        if expert < n_experts:
            gate = 1.0
            if gates is not None:
                gate = tl.load(gates + pair).to(tl.float32)
            for c in tl.static_range(CHUNKS):
                column = c * DEPTH + tl.arange(0, DEPTH)
                v = tl.load(hidden + (token * top_k + choice).to(tl.int64) * f + column, mask=column < f, other=0.0)
                w = _rows(down, expert * o, feature, o, column, f)
                total += gate * tl.sum(w * v.to(tl.float32)[None, :], 1)
    tl.store(y + token.to(tl.int64) * o + feature, total, mask=feature < o)
