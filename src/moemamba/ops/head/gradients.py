"""Autograd of a loss that is computed together with its gradients: the backward pass only scales them.

For an op (hidden, weight, targets, ignore_index, gradients) -> (loss, dhidden, dweight).
"""

from typing import Any

import torch
from torch import Tensor

from ..kit.op import Op


def scales_gradients(op: Op[..., Any]) -> None:
    """Tell autograd so."""
    op.custom.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """What it returns is constant to autograd, so that a derivative of it would be wrong: refused."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'linear_cross_entropy has no second derivative here; use ops.backend("reference"), or no create_graph'
        )
    dhidden, dweight = ctx.saved_tensors
    return (dhidden * grad).to(dhidden.dtype), (dweight * grad).to(ctx.dtype), None, None, None
