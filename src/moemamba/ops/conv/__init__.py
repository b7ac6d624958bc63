"""The causal depthwise convolution."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import dense, expect, sizes
from ..choice import Door, compute, declare, why_not
from . import reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time: `y_t = activation(bias + sum_j weight_j x_{t - k + 1 + j})`.

    Args:
        x: (b, l, i).
        weight: (i, k), the last tap meets the current position.
        bias: (i,).
        activation: "silu" or None.
        initial_state: (b, i, k-1) the inputs before the first position, oldest first; zeros if None.
        seq_idx: (b, l), as in `selective_scan`: a window never reaches into another sequence, and skips padding.
    Returns:
        y: (b, l, i) in x's dtype.
        final_state: (b, i, k-1) the last inputs of the row's last sequence, oldest first, in x's dtype.
    """
    if activation not in ("silu", None):
        raise ValueError(f'activation is {activation!r}; causal_conv1d knows "silu" and None')
    batch, length, width = sizes("x", x, "b, l, i")
    expect("weight", weight, (width, weight.shape[-1]))
    expect("bias", bias, (width,))
    expect("initial_state", initial_state, (batch, width, weight.shape[1] - 1))
    expect("seq_idx", seq_idx, (batch, length))
    args = (x, weight, dense(bias), activation, initial_state, dense(seq_idx))
    return compute("causal_conv1d", *args)


def _cpu() -> Callable[..., Any]:
    from .cpu import causal_conv1d

    return causal_conv1d


def _triton() -> Callable[..., Any]:
    from .triton import causal_conv1d

    return causal_conv1d


def _cuda() -> Callable[..., Any]:
    from .triton import conv_with_cuda

    return conv_with_cuda


declare(
    "causal_conv1d",
    reference.causal_conv1d,
    cpu=Door(_cpu),
    # The forward pass of this door is Triton's, so that it needs both.
    cuda=Door(_cuda, holds="the gradient alone", why_not=lambda device: why_not("triton", device)),
    triton=Door(_triton),
)
