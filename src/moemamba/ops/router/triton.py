"""A whole router of many tokens on the GPU: its product, then choices, gates and totals in one kernel; so back.

Totals are sums of one program each, added up by a second kernel: no atomics, so that they are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.op import gradient, op
from .triton_few import product, product_backward

ELEMENTS = 4096  # of the logits that a program holds at once
LANES = 32  # experts that lie across threads, four in each; further ones are a thread's own
PROGRAMS = 264  # of a kernel that adds up totals, about


def route_with_totals(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.route_with_totals`."""
    indices, gates, totals, _ = _route(x, weight, bias, top_k, valid, groups)
    probabilities, z, others = totals.split([weight.shape[0], 1, weight.shape[0] + 1], 1)
    others = others.detach()
    return indices, gates, others[:, 1:], probabilities, z.squeeze(1), others[:, 0]


def _like_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, e = x.shape[0], weight.shape[0]
    logits = x.new_empty(tokens, e, dtype=torch.float32)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    return indices, logits.new_empty(tokens, top_k), logits.new_empty(groups, 2 * e + 2), logits


@op("route_with_totals", fake=_like_outputs)
def _route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices and gates (t, k); totals (g, 2 e + 2) of probabilities, log_z^2, entropy and choices; logits (t, e)."""
    logits = product(x, weight)
    (tokens, n_experts), size = logits.shape, x.shape[0] // groups
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    gates = logits.new_empty(tokens, top_k)
    tile, (blocks, _) = _cut(size, groups, n_experts)
    parts = logits.new_empty(groups, blocks if tokens else 0, 2 * n_experts + 2)
    if tokens:
        chunk = triton.cdiv(triton.cdiv(size, blocks), tile["ROWS"]) * tile["ROWS"]
        _choose[(blocks, groups)](
            logits, bias, valid, indices, gates, parts, size, n_experts, chunk, K=top_k, num_warps=4, **tile
        )
    return indices, gates, parts.sum(1), logits


@gradient(_route, outputs="indices, gates, totals, logits", of="x, weight")
def _route_backward(
    dgates: Tensor | None,
    dtotals: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    indices: Tensor,
    valid: Tensor | None,
) -> list[Tensor]:
    tokens, n_experts = logits.shape
    groups = 1 if dtotals is None else dtotals.shape[0]
    dlogits = torch.empty_like(logits, dtype=x.dtype)
    size = tokens // groups
    tile, _ = _cut(size, groups, n_experts)
    if tokens:
        dgates, dtotals = (None if d is None else d.contiguous() for d in (dgates, dtotals))
        _choose_backward[(triton.cdiv(size, tile["ROWS"]), groups)](
            logits,
            indices,
            valid,
            dgates,
            dtotals,
            dlogits,
            size,
            n_experts,
            K=indices.shape[1],
            num_warps=4,
            **tile,
        )
    return product_backward(dlogits, x, weight)


def _cut(size: int, groups: int, n_experts: int) -> tuple[dict[str, int], tuple[int, int]]:
    """How kernels hold the experts (in PARTS of E) of ROWS tokens, and the grid: blocks of a group's tokens, groups."""
    parts, e = max(1, triton.next_power_of_2(n_experts) // LANES), min(LANES, triton.next_power_of_2(n_experts))
    rows = max(1, ELEMENTS // (parts * e))
    blocks = min(triton.cdiv(size, rows), max(1, PROGRAMS // groups))
    return {"PARTS": parts, "E": e, "ROWS": rows}, (max(1, blocks), groups)


@triton.jit
def _over(x, MAXIMUM: tl.constexpr):
    """Sum, or largest, over the experts (ROWS, PARTS, E) -> (ROWS,): first over a thread's own."""
    return tl.max(tl.max(x, 1), 1) if MAXIMUM else tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _experts(PARTS: tl.constexpr, E: tl.constexpr):
    return tl.arange(0, PARTS)[None, :, None] * E + tl.arange(0, E)[None, None, :]


@triton.jit
def _softmax(logits, place, real, expert, n_experts):
    """Logits (0 where there are none), probabilities and log_z of some tokens."""
    x = tl.load(logits + place[:, None, None] * n_experts + expert, mask=real, other=0.0)
    top = _over(tl.where(expert < n_experts, x, float("-inf")), True)
    p = tl.where(expert < n_experts, tl.exp(x - top[:, None, None]), 0.0)
    total = _over(p, False)
    return x, p / total[:, None, None], top + tl.log(total)


@triton.jit
def _choose(
    logits, bias, valid, indices, gates, parts, size, n_experts, chunk,
    K: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Choices and gates of a chunk of a group's tokens, and their sums; of equal experts the first."""
    expert = _experts(PARTS, E)
    shift = tl.load(bias + expert, mask=expert < n_experts, other=0.0).to(tl.float32)
    probabilities = tl.zeros((ROWS, PARTS, E), tl.float32)
    load = tl.zeros((ROWS, PARTS, E), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, size)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        place = tl.program_id(1).to(tl.int64) * size + rows
        real = (rows < end)[:, None, None] & (expert < n_experts)
        x, p, log_z = _softmax(logits, place, real, expert, n_experts)
        count = (rows < end).to(tl.float32)
        if valid is not None:
            count = tl.load(valid + place, mask=rows < end, other=0.0).to(tl.float32)
        scores = p + shift
        scores = tl.where(scores == scores, scores, -1e30)  # of nonsense the first experts, each once
        scores = tl.where(expert < n_experts, scores, float("-inf"))
        for k in tl.static_range(K):
            best = -_over(tl.where(scores == _over(scores, True)[:, None, None], -expert, -PARTS * E), True)
            chosen = expert == best[:, None, None]
            gate = _over(tl.where(chosen, p, 0.0), False)
            load += tl.where(chosen, count[:, None, None], 0.0)
            tl.store(indices + place * K + k, tl.where(count > 0, best, n_experts).to(tl.int64), mask=rows < end)
            tl.store(gates + place * K + k, tl.where(count > 0, gate, 0.0), mask=rows < end)
            scores = tl.where(chosen, float("-inf"), scores)
        # Selected, not multiplied by zero: padding may hold what is not a number.
        probabilities += tl.where(count[:, None, None] > 0, p, 0.0)
        squares += tl.where(count > 0, log_z * log_z, 0.0)
        entropy += tl.where(count > 0, log_z - _over(p * x, False), 0.0)
    part = parts + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * n_experts + 2)
    place = tl.arange(0, PARTS)[:, None] * E + tl.arange(0, E)[None, :]
    tl.store(part + place, tl.sum(probabilities, 0), mask=place < n_experts)
    tl.store(part + n_experts, tl.sum(squares, 0))
    tl.store(part + n_experts + 1, tl.sum(entropy, 0))
    tl.store(part + n_experts + 2 + place, tl.sum(load, 0), mask=place < n_experts)


@triton.jit
def _choose_backward(
    logits, indices, valid, dgates, dtotals, dlogits, size, n_experts,
    K: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dlogits of ROWS tokens from what is wanted of their gates, and of their group's totals."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = _experts(PARTS, E)
    place = tl.program_id(1).to(tl.int64) * size + rows
    real = (rows < size)[:, None, None] & (expert < n_experts)
    _, p, log_z = _softmax(logits, place, real, expert, n_experts)
    dp = tl.zeros((ROWS, PARTS, E), tl.float32)
    dlog_z = tl.zeros((ROWS,), tl.float32)
    count = (rows < size).to(tl.float32)
    if valid is not None:
        count = tl.load(valid + place, mask=rows < size, other=0.0).to(tl.float32)
    if dtotals is not None:
        total = dtotals + tl.program_id(1).to(tl.int64) * (2 * n_experts + 2)
        everywhere = total + expert + 0 * rows[:, None, None]  # a whole tile, or all would take this load's layout
        dp += tl.load(everywhere, mask=real, other=0.0) * count[:, None, None]
        dlog_z += 2 * log_z * count * tl.load(total + n_experts)
    if dgates is not None:
        for k in tl.static_range(K):
            chosen = tl.load(indices + place * K + k, mask=rows < size, other=n_experts)
            dgate = tl.load(dgates + place * K + k, mask=rows < size, other=0.0)
            dp += tl.where(expert == chosen[:, None, None], dgate[:, None, None], 0.0)
    dx = p * (dp - _over(p * dp, False)[:, None, None] + dlog_z[:, None, None])
    dx = tl.where(count[:, None, None] > 0, dx, 0.0)
    tl.store(dlogits + place[:, None, None] * n_experts + expert, dx.to(dlogits.dtype.element_ty), mask=real)
