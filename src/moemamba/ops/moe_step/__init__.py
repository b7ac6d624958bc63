"""One position of a whole mixture-of-experts sub-layer: norm, router, choice, experts, sum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import expect, sizes
from ..choice import OPS, Door, choose, compute, declare, unsupported
from ..experts import ACTIVATIONS, GATED
from . import reference

FASTEST = 1024
"""rows up to which the kernels are cut: more are worth sorting"""
EXPERTS, CHOICES = 128, 16
"""as many as the kernels were tried with: a program holds the scores of all experts at once"""


def moe_step(
    x: Tensor,
    router: Tensor,
    balance_bias: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    *,
    activation: str = "relu",
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One position of a whole mixture-of-experts layer: what `layers.MoE` computes with its weights, dropless.

    No gradients where it is kernels of its own; see `fuses_moe_step`. Of equal experts the first are chosen.

    Args:
        x: (b, 1, d).
        router: (e, d), whose logits are float32 whatever the dtype of x.
        balance_bias: (e,), added to the scores for the choice alone.
        up, down: (e, f, d) or (e, 2f, d), and (e, d, f); see `ops.expert_feedforward`.
        top_k: experts that each row visits, k.
        activation, up_bias, down_bias: see there.
        logit_bias, scores: see `ops.router_choices`.
        norm_weight: (d,) makes this the residual sub-layer `x + layer(norm(x))`, with the root-mean-square norm;
        norm_bias: (d,) with it the norm is layer normalisation.
        eps: of the norm.
    Returns:
        (b, 1, d).
    """
    batch, _, d = sizes("x", x, "b, 1, d")
    n_experts, rows, _ = sizes("up", up, "e, f, d")
    expect("x", x, (batch, 1, d))
    expect("router", router, (n_experts, d))
    expect("balance_bias", balance_bias, (n_experts,))
    expect("up", up, (n_experts, rows, d))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; of {n_experts} experts a token can choose 1 to {n_experts}")
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f'scores is {scores!r}; a router knows "softmax" and "sigmoid"')
    expect("down", down, (n_experts, d, rows // 2 if activation in GATED else rows))
    expect("logit_bias", logit_bias, (n_experts,))
    expect("up_bias", up_bias, (n_experts, rows))
    expect("down_bias", down_bias, (n_experts, d))
    expect("norm_weight", norm_weight, (d,))
    expect("norm_bias", norm_bias, (d,))
    routing = (top_k, activation, logit_bias, scores)
    rest = (up_bias, down_bias, norm_weight, norm_bias, eps)
    return compute("moe_step", x, router, balance_bias, up, down, *routing, *rest)  # type: ignore[no-any-return]


def fuses_moe_step(x: Tensor, *arguments: Any) -> bool:
    """Whether `moe_step` has kernels of its own for such an x (b, 1, d) and what follows it, in `moe_step`'s order."""
    return choose("moe_step", x, *arguments) != "reference"


def why_not_moe_step(x: Tensor, *arguments: Any) -> str | None:
    """Why `fuses_moe_step` says no where a GPU could otherwise; one sentence."""
    return unsupported(OPS["moe_step"].doors["triton"], (x, *arguments))


def _supports(x: Tensor, *arguments: Any) -> str | None:
    if not arguments:
        return None
    router, balance_bias, up, down, top_k = arguments[:5]
    if up.dtype != x.dtype or down.dtype != x.dtype:
        return f"its experts are of {up.dtype} and {down.dtype}, and the rows of {x.dtype}"
    if router.dtype not in (x.dtype, torch.float32):
        return f"its router is of {router.dtype}, and the rows of {x.dtype}"
    if not all(weight.is_contiguous() for weight in (router, balance_bias, up, down)):
        return "its weights are not contiguous"
    if not 0 < x.shape[0] <= FASTEST:
        return f"it has kernels for 1 to {FASTEST} rows"
    if router.shape[0] > EXPERTS:
        return f"it has {router.shape[0]} experts, and the kernels hold the scores of up to {EXPERTS}"
    return f"it has kernels for up to {CHOICES} choices of a row" if top_k > CHOICES else None


def _triton() -> Callable[..., Any]:
    from .triton import moe_step

    return moe_step


declare("moe_step", reference.moe_step, triton=Door(_triton, holds="no gradient", supports=_supports, asked=True))
