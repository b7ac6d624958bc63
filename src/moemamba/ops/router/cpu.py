"""A router's choices and statistics from its logits in one walk, without gradients: evaluation and generation.

For a single token the many small operations that this takes the place of cost more than the experts it chooses.
"""

import numpy as np
from torch import Tensor

from ..kit.cpu import LOG2E, exp2, floats, kernel, located, new
from ..kit.op import traced
from . import reference

_ZERO, _ONE = np.float32(0), np.float32(1)


def route_with_stats(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.route_with_stats`."""
    tokens, n_experts = logits.shape
    chosen, gates = new(2, tokens, top_k).unbind()
    sums, load = new(3), new(n_experts)
    places = None if traced(logits, bias) else located(logits, bias, chosen, gates, sums, load)
    if places is None:
        return reference.route_with_stats(logits, bias, top_k)
    _route(0, tokens, n_experts, top_k, *places)
    balance_loss, z_loss, entropy = sums.unbind()
    return chosen.long(), gates, balance_loss, z_loss, load, entropy


@kernel
def _route(
    first: int,
    last: int,
    n_experts: int,
    top_k: int,
    logits: int,
    bias: int,
    chosen: int,
    gates: int,
    sums: int,
    load: int,
) -> None:
    shift, loads, totals = floats(bias, (n_experts,)), floats(load, (n_experts,)), floats(sums, (3,))
    p, mean = np.empty(n_experts, np.float32), np.zeros(n_experts, np.float32)
    taken = np.empty(n_experts, np.bool_)
    for e in range(n_experts):
        loads[e] = _ZERO
    z_loss = entropy = _ZERO
    for token in range(first, last):
        x = floats(logits + 4 * n_experts * token, (n_experts,))
        experts, shares = floats(chosen + 4 * top_k * token, (top_k,)), floats(gates + 4 * top_k * token, (top_k,))
        top = x[0]
        for e in range(n_experts):
            top = max(top, x[e])
        total = _ZERO
        for e in range(n_experts):
            p[e] = exp2(LOG2E * (x[e] - top))
            total += p[e]
        log_z, along = top + np.log(total), _ZERO
        for e in range(n_experts):
            p[e] /= total
            along += p[e] * x[e]
            mean[e] += p[e]
            taken[e] = False
        z_loss += log_z * log_z
        entropy += log_z - along
        for j in range(top_k):
            best = -1
            for e in range(n_experts):
                if not taken[e] and (best < 0 or p[e] + shift[e] > p[best] + shift[best]):
                    best = e
            taken[best] = True
            loads[best] += _ONE
            experts[j], shares[j] = np.float32(best), p[best]
    tokens = np.float32(max(1, last - first))
    balance = _ZERO
    for e in range(n_experts):
        balance += loads[e] / (tokens * np.float32(top_k)) * (mean[e] / tokens)
    totals[0], totals[1], totals[2] = balance * np.float32(n_experts), z_loss / tokens, entropy / tokens
