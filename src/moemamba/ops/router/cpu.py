"""A router's choices, gates and sums in one walk, without gradients: evaluation and generation.

For a single token the many small operations that this takes the place of cost more than the experts it chooses. Logits
are those of `kit/cpu/product.py`, and all else is a function of a token's logits, so that a token's choices and gates
are the same bits whatever tokens it is routed with.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import LOG2E, address, clear, exact, exact_kernel, exp2, floats, integers, located, new, sigmoid
from ..kit.cpu.product import launch, linear
from ..kit.op import traced
from . import reference

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
    load, probabilities, sums = new(groups, n_experts), new(groups, n_experts), new(groups, 2)
    places = located(logits, bias, valid, gates, load, probabilities, sums)
    if places is None:
        return None
    _route(0, 1, tokens, n_experts, top_k, groups, scores == "sigmoid", indices.data_ptr(), *places)
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
    tensors, sigmoids = (x, weight, bias, logit_bias, gates, new(rows, n_experts)), scores == "sigmoid"
    places = located(*tensors)
    if places is None:
        return None
    at_x, at_weight, at_bias, at_logits, at_gates, logits = places
    chosen = address(indices, rows, top_k, dtype=torch.int64)

    kept = (*tensors, indices)

    def step(live: int) -> None:
        assert kept  # and so are not freed
        launch(live, d, n_experts, at_x, 4 * d, at_weight, 0, 0, at_logits, logits)
        _route(0, 1, live, n_experts, top_k, 1, sigmoids, chosen, logits, at_bias, 0, at_gates, 0, 0, 0)

    return step


@exact
def _softmax(x: Any, p: Any) -> Any:
    """p = softmax(x); log sum exp x."""
    top = x[0]
    for e in range(x.shape[0]):
        top = max(top, x[e])
    for e in range(x.shape[0]):
        p[e] = exp2(LOG2E * (x[e] - top))
    total = _ZERO
    for e in range(x.shape[0]):
        total += p[e]
    for e in range(x.shape[0]):
        p[e] /= total
    return top + np.log(total)


@exact
def _sigmoids(x: Any, p: Any) -> Any:
    """p = sigmoid(x), and its sum."""
    total = _ZERO
    for e in range(x.shape[0]):
        p[e] = sigmoid(x[e])
        total += p[e]
    return total


@exact
def _shares(p: Any, total: Any, sums: Any) -> Any:
    """Adds p / total to `sums`; their entropy."""
    entropy = _ZERO
    for e in range(p.shape[0]):
        share = p[e] / max(total, _TINY)
        sums[e] += share
        if share > _ZERO:
            entropy -= share * np.log(share)
    return entropy


@exact
def _largest(p: Any, shift: Any, taken: Any) -> int:
    """Which of those not taken has the largest p + shift, the first of equal ones."""
    best = -1
    for e in range(p.shape[0]):
        if not taken[e] and (best < 0 or p[e] + shift[e] > p[best] + shift[best]):
            best = e
    return best


@exact_kernel
def _route(
    first: int,
    last: int,
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
) -> None:
    """All tokens; without `load` no sums."""
    shift, counted = floats(bias, (n_experts,)), floats(valid, (tokens,))
    chosen, shares = integers(indices, (tokens, top_k)), floats(gates, (tokens, top_k))
    loads, totals = floats(load, (groups, n_experts)), floats(probabilities, (groups, n_experts))
    others = floats(sums, (groups, 2))
    p, taken = np.empty(n_experts, np.float32), np.empty(n_experts, np.bool_)
    size = max(1, tokens // groups)
    if load:
        clear(loads, 0, groups)
        clear(totals, 0, groups)
        clear(others, 0, groups)
    for token in range(tokens):
        if valid and counted[token] == _ZERO:
            for j in range(top_k):
                chosen[token, j], shares[token, j] = n_experts, _ZERO
            continue
        x = floats(logits + 4 * n_experts * token, (n_experts,))
        log_z = _softmax(x, p)
        total = _sigmoids(x, p) if sigmoids else _ONE
        for e in range(n_experts):
            taken[e] = False
        for j in range(top_k):
            best = _largest(p, shift, taken)
            taken[best] = True
            chosen[token, j], shares[token, j] = best, p[best]
            if load:
                loads[token // size, best] += _ONE
        if load:
            others[token // size, 0] += log_z * log_z
        if load and sigmoids:
            others[token // size, 1] += _shares(p, total, totals[token // size])
        elif load:
            along = _ZERO
            for e in range(n_experts):
                along += p[e] * x[e]
                totals[token // size, e] += p[e]
            others[token // size, 1] += log_z - along
