"""Linear layers of a few rows on the CPU, as in generation: the weights stream past once, in the order they lie in.

PyTorch gives such a product to a routine for large matrices, which takes two to six times as long over the same bytes.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import floats, located, new, traced
from .run import kernel, run, summing

FEW = 3  # rows up to which streaming the weights is faster
SMALL = 1 << 16  # weights below which it makes no difference, and PyTorch's call is the shorter
MULTIPLICATIONS = 8  # that take as long as one inner iteration of `WORTH_THREADS`

_ZERO = np.float32(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `moemamba.ops.linear`."""
    few = x.numel() <= FEW * x.shape[-1] and weight.numel() >= SMALL
    if not few or traced(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    width_out, width_in = weight.shape
    y = new(*x.shape[:-1], width_out)
    places = located(x, weight, bias, y)
    if places is None:
        return F.linear(x, weight, bias)
    rows = x.numel() // width_in
    run(_linear, width_out, rows * weight.numel() // MULTIPLICATIONS, rows, width_in, width_out, *places)
    return y


@summing
def product(y: Any, weight: int, x: Any) -> None:
    """y (m,) = weight (m, k) x (k,)."""
    k = x.shape[0]
    for j in range(y.shape[0]):
        row = floats(weight + 4 * k * j, (k,))
        total = _ZERO
        for c in range(k):
            total += row[c] * x[c]
        y[j] = total


@kernel
def _linear(
    first: int, last: int, rows: int, width_in: int, width_out: int, x: int, weight: int, bias: int, y: int
) -> None:
    """Columns first .. last - 1 of y."""
    for row in range(rows):
        out = floats(y + 4 * (row * width_out + first), (last - first,))
        product(out, weight + 4 * width_in * first, floats(x + 4 * row * width_in, (width_in,)))
        if bias:
            shift = floats(bias + 4 * first, (last - first,))
            for c in range(last - first):
                out[c] += shift[c]
