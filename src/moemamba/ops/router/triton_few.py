"""A router on the GPU: its product, float32 from tokens of any dtype, never copied; or all that decoding needs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.op import gradient, op
from ..kit.triton import launch, matrix, overlap, ready, vector

ROWS, COLUMNS = 128, 32  # of a program's tile
ROUTED = 16384  # weights that a program of `route` holds at once


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_float32`."""
    return _linear(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (t, d) @ weight (e, d).T in float32, as kernels of other ops use it."""
    (tokens, d), n_experts = x.shape, weight.shape[0]
    out = x.new_empty(tokens, n_experts, dtype=torch.float32)
    if tokens:
        parts = x.dtype == torch.bfloat16
        columns = min(COLUMNS, max(16, triton.next_power_of_2(n_experts)))
        grid = (triton.cdiv(tokens, ROWS), triton.cdiv(n_experts, columns))
        x, weight = x.contiguous(), weight.contiguous()
        _product[grid](
            x, weight, out, tokens, n_experts, d,
            ROWS=ROWS, COLUMNS=columns, DEPTH=64 if parts else 32, PARTS=parts, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def product_backward(dy: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """dx and dweight, each in its tensor's dtype, of dy in x's: products in that, accumulated in float32."""
    dx = torch.mm(dy, weight.to(x.dtype), out=torch.empty_like(x, memory_format=torch.contiguous_format))
    if x.is_cuda and x.dtype != torch.float32:
        dweight = torch.mm(dy.T, x, out_dtype=torch.float32)
    else:  # only CUDA has products of another dtype than their operands'
        dweight = dy.T.float() @ x.float()
    return [dx, dweight.to(weight.dtype)]


def _like_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@op("linear_float32", fake=_like_product)
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight)


@gradient(_linear, outputs="y", of="x, weight")
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    return product_backward(dy.to(x.dtype), x, weight)


@triton.jit
def _product(
    x, weight, out, tokens, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of out = x @ weight.T, in three products of tf32 parts.

    Of a bfloat16 x the PARTS of the weight in that type, three of which hold all its digits.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(x + rows * depth + k[None, :], mask=(rows < tokens) & (k < depth)[None, :], other=0.0)
        b = tl.load(weight + columns * depth + k[:, None], mask=(columns < width) & (k < depth)[:, None], other=0.0)
        if PARTS:
            b = b.to(tl.float32)
            high = b.to(tl.bfloat16)
            b -= high.to(tl.float32)
            middle = b.to(tl.bfloat16)
            low = (b - middle.to(tl.float32)).to(tl.bfloat16)
            product = tl.dot(a, low, product)
            product = tl.dot(a, middle, product)
            product = tl.dot(a, high, product)
        else:
            product = tl.dot(a.to(tl.float32), b.to(tl.float32), product, input_precision="tf32x3")
    tl.store(out + rows * width + columns, product, mask=(rows < tokens) & (columns < width))


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.route`: a program a token, whatever it reads again of the weights lies in the cache."""
    (tokens, d), n_experts = x.shape, weight.shape[0]
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    gates = x.new_empty(tokens, top_k, dtype=torch.float32)
    E = triton.next_power_of_2(n_experts)
    block = min(max(16, ROUTED // E), triton.next_power_of_2(d))
    _route[(tokens,)](
        x, weight, bias, indices, gates, n_experts, d,
        E=E, K=top_k, DEPTH=block, CHUNKS=triton.cdiv(d, block), **launch(8, overlap(x)),
    )  # fmt: skip
    return indices, gates


@triton.jit
def _route(
    x, weight, bias, indices, gates, n_experts, d,
    E: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits, softmax and choice of one token; of equal experts the first."""
    token = tl.program_id(0).to(tl.int64)
    expert, column = tl.arange(0, E), tl.arange(0, DEPTH)
    logits = tl.zeros((E,), tl.float32)
    w = matrix(weight, expert, n_experts, column, d)
    ready(PDL)
    for c in tl.static_range(CHUNKS):
        v = vector(x + token * d, c * DEPTH + column, d)
        logits += tl.sum(w.to(tl.float32) * v[None, :], 1)
        if c + 1 < CHUNKS:
            w = matrix(weight, expert, n_experts, (c + 1) * DEPTH + column, d)
    logits = tl.where(expert < n_experts, logits, float("-inf"))
    likely = tl.exp(logits - tl.max(logits, 0))
    likely = likely / tl.sum(likely, 0)
    scores = likely + tl.load(bias + expert, mask=expert < n_experts, other=0.0).to(tl.float32)
    scores = tl.where(expert < n_experts, scores, float("-inf"))
    for k in tl.static_range(K):
        best = tl.min(tl.where(scores == tl.max(scores, 0), expert, E), 0)
        tl.store(indices + token * K + k, best.to(tl.int64))
        tl.store(gates + token * K + k, tl.sum(tl.where(expert == best, likely, 0.0), 0))
        scores = tl.where(expert == best, float("-inf"), scores)
