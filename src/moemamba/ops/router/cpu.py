"""A router's choices, gates and sums in one walk, without gradients: evaluation and generation.

For a single token the many small operations that this takes the place of cost more than the experts it chooses. Logits
are those of `kit/cpu/product.py`, and all else is a function of a token's logits, so that a token's choices and gates
are the same bits whatever tokens it is routed with.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import LOG2E, address, apart, entry, exact, exact_kernel, exp2, floats, integers, located, new, sigmoid
from ..kit.cpu.product import launch, linear
from ..kit.op import traced
from . import reference

Parts = tuple[int, int, int]
"""see `_parts`"""

_ZERO, _ONE, _TINY = np.float32(0), np.float32(1), np.float32(1e-20)


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, logit_bias: Tensor | None = None, scores: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.router_choices`."""
    if traced(x, weight, logit_bias) or x.dtype == torch.float64:
        return reference.route(x, weight, bias, top_k, logit_bias, scores)
    return route_with_totals(x, weight, bias, top_k, None, 1, logit_bias, scores)[:2]  # type: ignore[return-value]


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `moemamba.ops.router.linear_float32`; plus a bias (e,)."""
    if traced(x, weight, bias) or x.dtype == torch.float64:
        return reference.logits(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return linear(x.float(), weight.float(), None if bias is None else bias.float())


def route_with_stats(
    logits: Tensor, bias: Tensor, top_k: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.router.route_with_stats`."""
    found = None if traced(logits, bias) else _route_logits(logits, bias, top_k, None, 1, scores)
    if found is None:
        return reference.route_with_stats(logits, bias, top_k, scores)
    indices, gates, load, probabilities, z, entropy = found
    tokens, n_experts = logits.shape
    each = max(1, tokens)
    balance_loss = (load[0] / (each * top_k) * (probabilities[0] / each)).sum() * n_experts
    return indices, gates, balance_loss, z[0] / each, load[0], entropy[0] / each


def route_with_totals(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    valid: Tensor | None,
    groups: int,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.router`."""
    found = None
    if not traced(x, weight, bias, logit_bias) and x.dtype != torch.float64:
        found = _route_logits(linear_float32(x, weight, logit_bias), bias, top_k, valid, groups, scores)
    if found is None:
        return reference.route_with_totals(x, weight, bias, top_k, valid, groups, logit_bias, scores)
    return found


def _route_logits(
    logits: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int, scores: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Indices, gates, and the sums by group; None where the kernel cannot read what it is given."""
    tokens, n_experts = logits.shape
    indices, gates = new(tokens, top_k, dtype=torch.int64), new(tokens, top_k)
    load, probabilities, sums = (new(groups, wide).zero_() for wide in (n_experts, n_experts, 2))
    spare = new(2 * n_experts + 1)  # bound here, lest it be freed before it is written to
    places = located(logits, bias, valid, gates, load, probabilities, sums, spare)
    if places is None:
        return None
    _route(
        _parts(scores == "sigmoid"), tokens, n_experts, top_k, groups, scores == "sigmoid", indices.data_ptr(), *places
    )
    z, entropy = sums.unbind(1)
    return indices, gates, load, probabilities, z, entropy


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    indices: Tensor,
    gates: Tensor,
    logit_bias: Tensor | None,
    scores: str,
) -> Callable[[int], None] | None:
    """See `moemamba.ops.prepare_router`."""
    (rows, d), n_experts, top_k = x.shape, weight.shape[0], indices.shape[1]
    made = new(rows, n_experts), new(2 * n_experts + 1)
    tensors, sigmoids = (x, weight, bias, logit_bias, gates, *made), scores == "sigmoid"
    places = located(*tensors)
    if places is None:
        return None
    at_x, at_weight, at_bias, at_logits, at_gates, logits, spare = places
    chosen = address(indices, rows, top_k, dtype=torch.int64)

    kept = (*tensors, indices)

    def step(live: int) -> None:
        assert kept  # and so are not freed
        launch(live, d, n_experts, at_x, 4 * d, at_weight, 0, 0, at_logits, logits)
        _route(
            _parts(sigmoids), live, n_experts, top_k, 1, sigmoids, chosen, logits, at_bias, 0, at_gates, 0, 0, 0, spare
        )

    return step


@cache
def _parts(sigmoids: bool) -> Parts:
    """For kernels, where the functions below are; what is for sigmoids is compiled only where they are asked for."""
    return entry(_softmax), *((entry(_sigmoids), entry(_shares)) if sigmoids else (0, 0))


@apart(0)
def _softmax(logits: int, scores: int, n_experts: int, log_sum: int) -> None:
    """The scores are softmax x; log sum exp x."""
    x, p = floats(logits, n_experts), floats(scores, n_experts)
    top = x[0]
    for e in range(n_experts):
        top = max(top, x[e])
    for e in range(n_experts):
        p[e] = exp2(LOG2E * (x[e] - top))
    total = _ZERO
    for e in range(n_experts):
        total += p[e]
    for e in range(n_experts):
        p[e] /= total
    floats(log_sum, 1)[0] = top + np.log(total)


@apart(1)
def _sigmoids(logits: int, scores: int, n_experts: int) -> None:
    """The scores are sigmoid x."""
    x, p = floats(logits, n_experts), floats(scores, n_experts)
    for e in range(n_experts):
        p[e] = sigmoid(x[e])


@apart(2)
def _shares(scores: int, n_experts: int, sums: int, entropies: int) -> None:
    """Adds the scores' shares of their sum to `sums`, and the entropy of these shares to `entropies`."""
    p, totals, entropy = floats(scores, n_experts), floats(sums, n_experts), _ZERO
    total = _ZERO
    for e in range(n_experts):
        total += p[e]
    for e in range(n_experts):
        share = p[e] / max(total, _TINY)
        totals[e] += share
        if share > _ZERO:
            entropy -= share * np.log(share)
    floats(entropies, 1)[0] += entropy


@exact
def _largest(p: Any, shift: Any, taken: Any) -> int:
    """Which of those not taken has the largest p + shift, the first of equal ones."""
    best = -1
    for e in range(p.shape[0]):
        if taken[e] == _ZERO and (best < 0 or p[e] + shift[e] > p[best] + shift[best]):
            best = e
    return best


@exact_kernel
def _route(
    within: Parts,
    tokens: int,
    n_experts: int,
    top_k: int,
    groups: int,
    sigmoids: bool,
    indices: int,
    logits: int,
    bias: int,
    valid: int,
    gates: int,
    load: int,
    probabilities: int,
    sums: int,
    spare: int,
) -> None:
    """All tokens; what is summed is added to what is there, and not without `load`. `spare` is room for two numbers an
    expert, and one."""
    shift, counted = floats(bias, n_experts), floats(valid, tokens)
    p, taken, at_log = floats(spare, n_experts), floats(spare + 4 * n_experts, n_experts), spare + 8 * n_experts
    size = max(1, tokens // groups)
    for token in range(tokens):
        chosen, shares = integers(indices + 8 * top_k * token, top_k), floats(gates + 4 * top_k * token, top_k)
        if valid and counted[token] == _ZERO:
            for j in range(top_k):
                chosen[j], shares[j] = n_experts, _ZERO
            continue
        place = logits + 4 * n_experts * token
        _softmax(within, place, p, n_experts, at_log)
        if sigmoids:
            _sigmoids(within, place, p, n_experts)
        for e in range(n_experts):
            taken[e] = _ZERO
        for j in range(top_k):
            best = _largest(p, shift, taken)
            taken[best] = _ONE
            chosen[j], shares[j] = best, p[best]
        if load:
            row, group = 4 * n_experts * (token // size), sums + 8 * (token // size)
            loads, others, log_z = floats(load + row, n_experts), floats(group, 2), floats(at_log, 1)[0]
            for e in range(n_experts):
                loads[e] += taken[e]
            others[0] += log_z * log_z
            if sigmoids:
                _shares(within, p, n_experts, probabilities + row, group + 4)
            else:
                x, totals, along = floats(place, n_experts), floats(probabilities + row, n_experts), _ZERO
                for e in range(n_experts):
                    along += p[e] * x[e]
                    totals[e] += p[e]
                others[1] += log_z - along
