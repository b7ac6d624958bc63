"""The vocabulary head: its loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import autocast, expect, sizes
from ..choice import Door, compute, declare, expect_no_gradient
from ..kit.packed import Packed, Weight
from . import reference


def linear_cross_entropy(
    hidden: Tensor, weight: Weight, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against targets, without ever holding the (t, v) logits.

    Args:
        hidden: (t, d).
        weight: (v, d), also of 8 bits: see `ops.linear`.
        targets: (t,) int64; positions equal to `ignore_index` do not count.
        reduction: "mean" over the positions that count, or "sum".
    Returns:
        scalar in nats, float32.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; linear_cross_entropy knows "mean" and "sum"')
    tokens, d = sizes("hidden", hidden, "t, d")
    expect("weight", weight, (weight.shape[0], d))
    expect("targets", targets, (tokens,))
    hidden = autocast(hidden)
    if isinstance(weight, Packed):  # a loss is as it is in training, whose products read no others
        expect_no_gradient(hidden)
        weight = weight.dense(hidden.dtype)
    return compute("linear_cross_entropy", hidden, weight, targets, ignore_index, reduction)


def _loss_cpu() -> Callable[..., Any]:
    from .cpu import linear_cross_entropy

    return linear_cross_entropy


def _loss_triton() -> Callable[..., Any]:
    from .triton import linear_cross_entropy

    return linear_cross_entropy


declare("linear_cross_entropy", reference.linear_cross_entropy, cpu=Door(_loss_cpu), triton=Door(_loss_triton))
