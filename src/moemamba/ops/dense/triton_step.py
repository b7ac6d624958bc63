# mypy: ignore-errors
"""Linear layers of one decoded token on a GPU: with the norm before, or what there was before added, as one kernel.

ROWS rows share the weights that a program reads, which are asked for while the kernel before still runs. More than FEW
rows are left to the library, whose products are then larger than a launch. No gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.triton import launch, matrix, overlap, ready, vector
from ..kit.triton_step import Cut, activated, depth, moments, normalised, product
from . import reference

FEW = 16
ENTER = {1: Cut(1, 8, 1024, 4), 16: Cut(16, 16, 256, 4)}  # by the most rows
LEAVE = {1: Cut(1, 4, 2048, 4), 16: Cut(16, 16, 256, 4)}


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """See `moemamba.ops.norm_linear`."""
    (batch, d), groups = x.shape, 2 if activation in ("swiglu", "geglu") else 1
    if batch > FEW:
        return reference.norm_linear(x, weight, bias, norm_weight, norm_bias, eps, activation)
    f = weight.shape[0] // groups
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(batch, f)
    how = ENTER[1 if batch == 1 else 16]
    how = how._replace(depth=how.depth // groups)
    enter_kernel[(triton.cdiv(f, how.columns), triton.cdiv(batch, how.rows))](
        x, norm_weight, norm_bias, eps, weight, bias, y, batch, d, f,
        NORM=0 if norm_weight is None else 1 if norm_bias is None else 2, ACTIVATION=activation, GROUPS=groups,
        ROWS=how.rows, C=how.columns, **depth(how, d), **launch(how.warps, overlap(x)),
    )  # fmt: skip
    return y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """See `moemamba.ops.linear_add`."""
    (batch, f), d = x.shape, weight.shape[0]
    if batch > FEW:
        return reference.linear_add(x, weight, bias, residual)
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    y, how = torch.empty_like(residual), LEAVE[1 if batch == 1 else 16]
    leave_kernel[(triton.cdiv(d, how.columns), triton.cdiv(batch, how.rows))](
        x, weight, bias, residual, y, batch, d, f,
        ROWS=how.rows, C=how.columns, **depth(how, f), **launch(how.warps, overlap(x)),
    )  # fmt: skip
    return y


@triton.jit
def enter_kernel(
    x, norm_weight, norm_bias, eps, weight, bias, y, batch, d, f,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C outputs of ROWS rows: activation(weight norm(x) + bias)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    feature, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, DEPTH)
    second = weight + (tl.full((), 0, tl.int64) + f) * d
    wa = matrix(weight, feature, f, column, d)
    if GROUPS == 2:
        wb = matrix(second, feature, f, column, d)
    ready(PDL)
    mean = tl.zeros((ROWS,), tl.float32)
    inverse = mean + 1.0
    if NORM:
        mean, inverse = moments(x, rows, batch, d, eps, NORM, DEPTH, CHUNKS)
    a = tl.zeros((ROWS, C), tl.float32)
    b = tl.zeros((ROWS, C), tl.float32)
    for c in tl.static_range(CHUNKS):
        h = normalised(x, rows, batch, c * DEPTH + column, d, mean, inverse, norm_weight, norm_bias, NORM)
        a += product(h, wa, DOT)
        if GROUPS == 2:
            b += product(h, wb, DOT)
        if c + 1 < CHUNKS:
            wa = matrix(weight, feature, f, (c + 1) * DEPTH + column, d)
            if GROUPS == 2:
                wb = matrix(second, feature, f, (c + 1) * DEPTH + column, d)
    if bias is not None:
        a += vector(bias, feature, f)[None, :]
        if GROUPS == 2:
            b += vector(bias + f, feature, f)[None, :]
    place = rows[:, None].to(tl.int64) * f + feature[None, :]
    tl.store(y + place, activated(a, b, ACTIVATION), mask=(rows < batch)[:, None] & (feature < f)[None, :])


@triton.jit
def leave_kernel(
    x, weight, bias, residual, y, batch, d, f, ROWS: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C outputs of ROWS rows: residual + weight x + bias."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    feature, column = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, DEPTH)
    w = matrix(weight, feature, d, column, f)
    ready(PDL)
    inside = (rows < batch)[:, None] & (feature < d)[None, :]
    place = rows[:, None].to(tl.int64) * d + feature[None, :]
    total = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += vector(bias, feature, d)[None, :]
    for c in tl.static_range(CHUNKS):
        total += product(matrix(x, rows, batch, c * DEPTH + column, f).to(tl.float32), w, DOT)
        if c + 1 < CHUNKS:
            w = matrix(weight, feature, d, (c + 1) * DEPTH + column, f)
    tl.store(y + place, total, mask=inside)
