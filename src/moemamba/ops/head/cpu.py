"""The vocabulary head's loss on the CPU: the logits of some tokens at a time, turned into gradients where they lie.

The gradients are computed with the loss, so the head costs its three products and one walk over each row of logits,
and the backward pass only scales them.
"""

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import LOG2E, address, exp2, floats, kernel, new, run
from ..kit.op import op, wants_grad
from .gradients import scales_gradients

LOGITS = 1 << 20  # that exist at once, about: 4 MB

_ZERO, _ONE = np.float32(0), np.float32(1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    total, _, _ = _forward(hidden, weight, targets, ignore_index, wants_grad(hidden, weight))
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


@kernel
def _softmax(first: int, last: int, v: int, logits: int, counts: int, log_sum: int, gradient: bool) -> None:
    """log sum exp of rows first .. last - 1, and in their place softmax, or zeros where a row does not count."""
    sums, scale = floats(log_sum, (last,)), floats(counts, (last,))
    for row in range(first, last):
        x = floats(logits + 4 * v * row, (v,))
        top = x[0]
        for c in range(v):
            top = max(top, x[c])
        total = _ZERO
        for c in range(v):
            x[c] = exp2(LOG2E * (x[c] - top))
            total += x[c]
        sums[row] = top + np.log(total)
        if gradient and scale[row] == _ZERO:  # whatever there is, be it not a number
            for c in range(v):
                x[c] = _ZERO
        elif gradient:
            share = scale[row] / total
            for c in range(v):
                x[c] *= share


# --- what torch.compile and autograd see ---


def _outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, d = hidden.shape if gradients else (0, 0)
    v = weight.shape[0] if gradients else 0
    new = hidden.new_empty
    return new((), dtype=torch.float32), new(rows, d), new(v, d, dtype=torch.float32)


@op("cpu_linear_cross_entropy", fake=_outputs)
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss () float32 and, if wanted, its gradients: dhidden (t, d), and dweight (v, d) float32."""
    v, (total, dhidden, dweight) = weight.shape[0], _outputs(hidden, weight, targets, ignore_index, gradients)
    total.zero_()
    dweight.zero_()
    matrix = weight.to(hidden.dtype)
    size = max(1, LOGITS // max(1, v))
    for part in (slice(start, start + size) for start in range(0, hidden.shape[0], size)):
        h, kept = hidden[part], targets[part] != ignore_index
        if not kept.all():  # what does not count has no part in the products, be it not a number
            h = h.where(kept[:, None], 0)
        logits, counts = (h @ matrix.t()).float(), kept.float()
        place = targets[part].where(kept, 0)[:, None]
        chosen, log_sum, rows = logits.gather(1, place)[:, 0], new(len(h)), len(h)
        places = (address(logits, rows, v), address(counts, rows), address(log_sum, rows), gradients)
        run(_softmax, rows, logits.numel(), v, *places)
        total += (log_sum - chosen).where(kept, 0).sum()
        if gradients:
            difference = logits.scatter_add_(1, place, -counts[:, None]).to(hidden.dtype)
            torch.mm(difference, matrix, out=dhidden[part])
            dweight.add_(difference.t() @ h)
    return total, dhidden, dweight


scales_gradients(_forward)
