"""The product of a router on the GPU: float32 results from tokens of any dtype, which are never copied to float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 128, 32, 32  # of a program's tile, and what it multiplies at once
CHUNK = 1024  # tokens whose share of the weights' gradient one program sums


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_float32`."""
    return _linear(x, weight)  # type: ignore[no-any-return]


@torch.library.custom_op("moemamba::linear_float32", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight, x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32), "tf32x3")


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("moemamba::linear_float32_backward", mutates_args=())
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight, each in its tensor's dtype; tf32 is finer than the rounding to any 16-bit dx."""
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    (tokens, n), d = dy.shape, x.shape[1]
    dy, x = dy.contiguous(), x.contiguous()
    dx = _product(dy, weight.T, torch.empty_like(x), precision)
    parts = dy.new_empty(triton.cdiv(tokens, CHUNK), n, d)
    grid = (parts.shape[0], triton.cdiv(n, COLUMNS), triton.cdiv(d, ROWS))
    if tokens:
        tile = {"ROWS": COLUMNS, "COLUMNS": ROWS, "DEPTH": 2 * DEPTH, "PRECISION": precision}
        _transposed[grid](dy, x, parts, tokens, n, d, CHUNK, **tile, num_warps=8)
    return dx, parts.sum(0, dtype=torch.float32).to(weight.dtype)


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _linear_backward(dy, *ctx.saved_tensors)  # type: ignore[no-any-return]


_linear.register_autograd(_differentiate, setup_context=_keep)


def _product(a: Tensor, b: Tensor, out: Tensor, precision: str) -> Tensor:
    """out (t, n) = a (t, k) @ b (n, k).T, in b of any strides."""
    (tokens, k), n = a.shape, b.shape[0]
    rows, columns = (ROWS, COLUMNS) if n <= COLUMNS else (ROWS // 2, ROWS)
    if tokens:
        _plain[(triton.cdiv(tokens, rows), triton.cdiv(n, columns))](
            a.contiguous(),
            b,
            out,
            tokens,
            n,
            k,
            *b.stride(),
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=DEPTH,
            PRECISION=precision,
            num_warps=8,
            num_stages=3 if k > DEPTH else 1,  # a single pass has nothing to load ahead
        )
    return out


@triton.jit
def _plain(
    a, b, out, tokens, width, depth, b_n, b_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out = a @ b.T."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(a + rows * depth + k[None, :], mask=(rows < tokens) & (k < depth)[None, :], other=0.0)
        right = tl.load(b + columns * b_n + k[:, None] * b_k, mask=(columns < width) & (k < depth)[:, None], other=0.0)
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision=PRECISION)
    tl.store(out + rows * width + columns, product.to(out.dtype.element_ty), mask=(rows < tokens) & (columns < width))


@triton.jit
def _transposed(
    a, b, out, tokens, height, width, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out[chunk of tokens] = a (t, n).T @ b (t, k)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), DEPTH):
        token = (start + tl.arange(0, DEPTH)).to(tl.int64)
        here = token < tl.minimum(first + chunk, tokens)
        left = tl.load(a + token[None, :] * height + rows[:, None], mask=(rows < height)[:, None] & here, other=0.0)
        right = tl.load(b + token[:, None] * width + columns, mask=here[:, None] & (columns < width), other=0.0)
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * height + rows[:, None]) * width + columns
    tl.store(out + place, product, mask=(rows < height)[:, None] & (columns < width))
