"""Autograd of a loss that is computed together with its gradients: the backward pass only scales them.

For an op (hidden, weight, targets, ignore_index, gradients) -> (loss, dhidden, dweight).
"""

from typing import Any

import torch
from torch import Tensor


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For `setup_context`."""
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """For `backward`. What it returns is constant to autograd, so that a derivative of it would be wrong: refused."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'linear_cross_entropy has no second derivative here; use ops.backend("reference"), or no create_graph'
        )
    dhidden, dweight = ctx.saved_tensors
    return (dhidden * grad).to(dhidden.dtype), (dweight * grad).to(ctx.dtype), None, None, None
