"""Experts on the CPU: one matrix product for each expert that has rows, written straight into its slice of the result.

Without gradients, as in generation, see `cpu_exact.py`.
"""

import torch
from torch import Tensor

from ..kit.op import gradient, op, traced
from ..kit.packed import Weight, unpacked
from .cpu_exact import ACTIVATIONS as KINDS
from .cpu_exact import LINEAR, activated, experts
from .reference import ACTIVATIONS, dispatch, shifted


def activate(x: Tensor, activation: str) -> Tensor:
    """See `moemamba.ops.activate`."""
    y = None if traced(x) else activated(x, KINDS[activation])
    return ACTIVATIONS[activation](x) if y is None else y


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    return _grouped(x, weight, counts)


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Weight) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    y = None if traced(x, gates, weight) else experts(x, indices, gates, None, weight, LINEAR)
    if y is not None:
        return y
    weight = unpacked(weight, x.dtype)
    return dispatch(x, indices, gates, weight.shape[0], lambda rows, counts: _grouped(rows, weight, counts))


def expert_feedforward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    up: Weight,
    down: Weight,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""
    y, biases = None, (up_bias, down_bias)
    if not traced(x, gates, up, down, *biases):
        y = experts(x, indices, gates, up, down, KINDS[activation], *biases)
    if y is not None:
        return y
    up, down = unpacked(up, x.dtype), unpacked(down, x.dtype)
    act = ACTIVATIONS[activation]

    def through(rows: Tensor, counts: Tensor) -> Tensor:
        hidden = act(shifted(_grouped(rows, up, counts), up_bias, counts))
        return shifted(_grouped(hidden, down, counts), down_bias, counts)

    return dispatch(x, indices, gates, up.shape[0], through)


def _like_output(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@op("cpu_grouped_linear", fake=_like_output)
def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    sizes = _sizes(x, counts)
    for rows, matrix, out in zip(x.split(sizes), weight.unbind(), y.split(sizes), strict=False):
        if len(rows):
            torch.mm(rows, matrix.to(x.dtype).t(), out=out)
    y[x.shape[0] - sizes[-1] :] = 0
    return y


def _sizes(x: Tensor, counts: Tensor) -> list[int]:
    """Rows of every expert, and last those of none: all parts are cut at once, since a slice costs as much as a small
    product."""
    sizes = counts.tolist()
    return [*sizes, x.shape[0] - sum(sizes)]


@gradient(_grouped, outputs="y", of="x, weight")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> list[Tensor]:
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=x.dtype)
    sizes = _sizes(x, counts)
    parts = (x.split(sizes), dy.split(sizes), dx.split(sizes), weight.unbind(), dweight.unbind())
    for rows, drows, out, matrix, dmatrix in zip(*parts, strict=False):
        torch.mm(drows, matrix.to(x.dtype), out=out)
        torch.mm(drows.t(), rows, out=dmatrix)
    dx[x.shape[0] - sizes[-1] :] = 0
    return [dx, dweight.to(weight.dtype)]
