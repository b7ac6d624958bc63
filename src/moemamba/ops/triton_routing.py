"""A whole router of many tokens on the GPU: its product, then choices, gates and totals in one kernel; so back.

Totals are sums of one program each, added up by a second kernel: no atomics, so that they are the same in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_router import product, product_backward

ELEMENTS = 2048  # of the logits that a program holds


def route_with_totals(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.route_with_totals`."""
    indices, gates, totals, _ = _route(x, weight, bias, top_k, valid, groups)
    probabilities, z, others = totals.split([weight.shape[0], 1, weight.shape[0] + 1], 1)
    others = others.detach()
    return indices, gates, others[:, 1:], probabilities, z.squeeze(1), others[:, 0]


@torch.library.custom_op("moemamba::route_with_totals", mutates_args=())
def _route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices and gates (t, k); totals (g, 2 e + 2) of probabilities, log_z^2, entropy and choices; logits (t, e)."""
    logits = product(x, weight)
    (tokens, n_experts), size = logits.shape, x.shape[0] // groups
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    gates = logits.new_empty(tokens, top_k)
    rows, blocks = _cut(size, n_experts)
    parts = logits.new_empty(groups, blocks if tokens else 0, 2 * n_experts + 2)
    if tokens:
        _choose[(blocks, groups)](
            logits, bias, valid, indices, gates, parts, size, n_experts, blocks,
            E=triton.next_power_of_2(n_experts), K=top_k, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return indices, gates, parts.sum(1), logits


@_route.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, e = x.shape[0], weight.shape[0]
    logits = x.new_empty(tokens, e, dtype=torch.float32)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    return indices, logits.new_empty(tokens, top_k), logits.new_empty(groups, 2 * e + 2), logits


@torch.library.custom_op("moemamba::route_with_totals_backward", mutates_args=())
def _route_backward(
    dgates: Tensor | None,
    dtotals: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    indices: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx and dweight."""
    tokens, n_experts = logits.shape
    groups = 1 if dtotals is None else dtotals.shape[0]
    dlogits = torch.empty_like(logits, dtype=x.dtype)
    rows, blocks = _cut(tokens // groups, n_experts)
    if tokens:
        _choose_backward[(blocks, groups)](
            logits, indices, valid,
            None if dgates is None else dgates.contiguous(), None if dtotals is None else dtotals.contiguous(),
            dlogits, tokens // groups, n_experts,
            E=triton.next_power_of_2(n_experts), K=indices.shape[1], ROWS=rows, num_warps=4,
        )  # fmt: skip
    return product_backward(dlogits, x, weight)


@_route_backward.register_fake
def _(
    dgates: Tensor | None,
    dtotals: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    indices: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, valid, _ = inputs
    indices, _, _, logits = output
    ctx.save_for_backward(x, weight, logits, indices, valid)
    ctx.mark_non_differentiable(indices, logits)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, _: None, dgates: Tensor | None, dtotals: Tensor | None, __: None
) -> tuple[Tensor | None, ...]:
    dx, dweight = _route_backward(dgates, dtotals, *ctx.saved_tensors)
    return dx, dweight, None, None, None, None


_route.register_autograd(_differentiate, setup_context=_keep)


def _cut(size: int, n_experts: int) -> tuple[int, int]:
    """Tokens of a program, and programs of a routing group of `size` tokens."""
    rows = max(1, ELEMENTS // triton.next_power_of_2(n_experts))
    return rows, max(1, triton.cdiv(size, rows))


@triton.jit
def _softmax(logits, place, rows, columns, size, n_experts):
    """Logits (0 where there are none), probabilities and log_z of some tokens."""
    real = (rows < size)[:, None] & (columns < n_experts)[None, :]
    x = tl.load(logits + place[:, None] * n_experts + columns[None, :], mask=real, other=0.0)
    top = tl.max(tl.where((columns < n_experts)[None, :], x, float("-inf")), 1)
    p = tl.where((columns < n_experts)[None, :], tl.exp(x - top[:, None]), 0.0)
    total = tl.sum(p, 1)
    return x, p / total[:, None], top + tl.log(total)


@triton.jit
def _choose(
    logits, bias, valid, indices, gates, parts, size, n_experts, blocks,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Choices and gates of ROWS tokens of a group, and their sums; of equal experts the first."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, E)
    place = tl.program_id(1).to(tl.int64) * size + rows
    x, p, log_z = _softmax(logits, place, rows, columns, size, n_experts)
    count = (rows < size).to(tl.float32)
    if valid is not None:
        count = tl.load(valid + place, mask=rows < size, other=0.0).to(tl.float32)
    scores = p + tl.load(bias + columns, mask=columns < n_experts, other=0.0).to(tl.float32)[None, :]
    scores = tl.where(scores == scores, scores, -1e30)  # of nonsense the first experts, each once
    scores = tl.where((columns < n_experts)[None, :], scores, float("-inf"))
    load = tl.zeros((ROWS, E), tl.float32)
    for k in tl.static_range(K):
        best = tl.min(tl.where(scores == tl.max(scores, 1)[:, None], columns[None, :], E), 1)
        chosen = columns[None, :] == best[:, None]
        gate = tl.sum(tl.where(chosen, p, 0.0), 1)
        load += tl.where(chosen, count[:, None], 0.0)
        tl.store(indices + place * K + k, tl.where(count > 0, best, n_experts).to(tl.int64), mask=rows < size)
        tl.store(gates + place * K + k, tl.where(count > 0, gate, 0.0), mask=rows < size)
        scores = tl.where(chosen, float("-inf"), scores)
    part = parts + (tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)) * (2 * n_experts + 2)
    tl.store(part + columns, tl.sum(p * count[:, None], 0), mask=columns < n_experts)
    tl.store(part + n_experts, tl.sum(log_z * log_z * count, 0))
    tl.store(part + n_experts + 1, tl.sum((log_z - tl.sum(p * x, 1)) * count, 0))
    tl.store(part + n_experts + 2 + columns, tl.sum(load, 0), mask=columns < n_experts)


@triton.jit
def _choose_backward(
    logits, indices, valid, dgates, dtotals, dlogits, size, n_experts,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dlogits of ROWS tokens from what is wanted of their gates, and of their group's totals."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, E)
    place = tl.program_id(1).to(tl.int64) * size + rows
    _, p, log_z = _softmax(logits, place, rows, columns, size, n_experts)
    dp = tl.zeros((ROWS, E), tl.float32)
    dlog_z = tl.zeros((ROWS,), tl.float32)
    if dtotals is not None:
        total = dtotals + tl.program_id(1).to(tl.int64) * (2 * n_experts + 2)
        count = (rows < size).to(tl.float32)
        if valid is not None:
            count = tl.load(valid + place, mask=rows < size, other=0.0).to(tl.float32)
        dp += tl.load(total + columns, mask=columns < n_experts, other=0.0)[None, :] * count[:, None]
        dlog_z += 2 * log_z * count * tl.load(total + n_experts)
    if dgates is not None:
        for k in tl.static_range(K):
            chosen = tl.load(indices + place * K + k, mask=rows < size, other=n_experts)
            dgate = tl.load(dgates + place * K + k, mask=rows < size, other=0.0)
            dp += tl.where(columns[None, :] == chosen[:, None], dgate[:, None], 0.0)
    dx = p * (dp - tl.sum(p * dp, 1)[:, None] + dlog_z[:, None])
    real = (rows < size)[:, None] & (columns < n_experts)[None, :]
    tl.store(dlogits + place[:, None] * n_experts + columns[None, :], dx.to(dlogits.dtype.element_ty), mask=real)
