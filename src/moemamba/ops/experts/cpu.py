"""Experts on the CPU: one matrix product for each expert that has rows, written straight into its slice of the result.

A handful of tokens, as in generation, goes through its experts' matrices one by one and touches no others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kit.cpu import new, traced
from ..kit.cpu.product import linear
from .reference import ACTIVATIONS, dispatch

FEW = 4  # choices up to which sorting them costs more than it saves

Expert = Callable[[Tensor, int], Tensor]


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    return _grouped(x, weight, counts)


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    if indices.numel() <= FEW and not traced(x, gates, weight):
        return _one_by_one(x, indices, gates, weight.shape, lambda row, e: linear(row, weight[e].to(row.dtype), None))
    return dispatch(x, indices, gates, weight.shape[0], lambda rows, counts: _grouped(rows, weight, counts))


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""
    act = ACTIVATIONS[activation]
    if indices.numel() <= FEW and not traced(x, gates, up, down):

        def expert(row: Tensor, e: int) -> Tensor:
            hidden = act(linear(row, up[e].to(row.dtype), None))
            return linear(hidden, down[e].to(row.dtype), None)

        return _one_by_one(x, indices, gates, down.shape, expert)

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        return _grouped(act(_grouped(rows, up, counts)), down, counts)

    return dispatch(x, indices, gates, up.shape[0], experts)


def _one_by_one(x: Tensor, indices: Tensor, gates: Tensor | None, shape: torch.Size, expert: Expert) -> Tensor:
    """Without gradients: every choice by itself, with weights of `shape` (e, o, ·)."""
    n_experts, width, _ = shape
    y = new(x.shape[0], width).zero_()
    shares_of = [[1.0] * indices.shape[1]] * len(x) if gates is None else gates.tolist()
    for token, (chosen, shares) in enumerate(zip(indices.tolist(), shares_of, strict=True)):
        for e, share in zip(chosen, shares, strict=True):
            if e < n_experts:
                y[token].add_(expert(x[token], e), alpha=share)
    return y.to(x.dtype)


@torch.library.custom_op("moemamba::cpu_grouped_linear", mutates_args=())
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


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("moemamba::cpu_grouped_linear_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, counts: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.empty_like(x), weight.new_empty(weight.shape, dtype=x.dtype)
    sizes = _sizes(x, counts)
    parts = (x.split(sizes), dy.split(sizes), dx.split(sizes), weight.unbind(), dweight.unbind())
    for rows, drows, out, matrix, dmatrix in zip(*parts, strict=False):
        torch.mm(drows, matrix.to(x.dtype), out=out)
        torch.mm(drows.t(), rows, out=dmatrix)
    dx[x.shape[0] - sizes[-1] :] = 0
    return dx, dweight.to(weight.dtype)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(*ctx.saved_tensors, dy), None


_grouped.register_autograd(_differentiate, setup_context=_keep_for_backward)
