"""A linear layer that reads what others read too: both gradients of its input are added within its backward product."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..kit.op import op

LAUNCH = {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4}


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.linear_beside`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype != x.dtype or not torch.is_grad_enabled():
        return x, F.linear(x, weight)
    y: tuple[Tensor, Tensor] = _Beside.apply(x, weight.to(dtype))  # type: ignore[no-untyped-call]
    return y


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x.view_as(x), F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        return _add_product(dx, dy, weight), dy.T @ x.reshape(-1, x.shape[-1])


def _like_dx(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(dx, memory_format=torch.contiguous_format)


@op("add_product", fake=_like_dx)
def _add_product(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """dx (..., d) + dy (t, f) @ weight (f, d), rounded once."""
    dx, dy, weight = dx.contiguous(), dy.contiguous(), weight.contiguous()
    out = torch.empty_like(dx)
    (tokens, depth), width = dy.shape, weight.shape[1]
    if tokens:
        tiles = triton.cdiv(tokens, LAUNCH["ROWS"]), triton.cdiv(width, LAUNCH["COLUMNS"])
        _kernel[(tiles[0] * tiles[1],)](dx, dy, weight, out, tokens, depth, width, **LAUNCH)
    return out


@triton.jit
def _kernel(
    dx, dy, weight, out, tokens, depth, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of out = dx + dy @ weight; tiles side by side follow each other, so that they find dy in the cache."""
    across = tl.cdiv(width, COLUMNS)
    rows = ((tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < tokens) & (columns < width)
    other = tl.load(dx + rows * width + columns, mask=inside, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(dy + rows * depth + k[None, :], mask=(rows < tokens) & (k < depth)[None, :], other=0.0)
        b = tl.load(weight + k[:, None] * width + columns, mask=(k < depth)[:, None] & (columns < width), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + rows * width + columns, (total + other.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
