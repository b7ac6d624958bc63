"""Routers: which experts a token visits, and the sums that say how balanced that is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import dense, expect, sizes
from ..choice import Door, choose, compute, declare
from . import reference

FEW = 256  # tokens up to which choosing is one kernel, each of whose programs reads all of the weights


class Routed(NamedTuple):
    """What a router chose for t tokens in g groups, and the sums that its losses are made of."""

    indices: Tensor
    """(t, k) int64, the likeliest first; n_experts at padding"""
    gates: Tensor
    """(t, k) float32, their scores; 0 at padding"""
    load: Tensor
    """(g, e) float32 choices that fell on each expert"""
    probabilities: Tensor
    """(g, e) sum of the tokens' probabilities; with sigmoid scores those are shares of a token's sum of scores"""
    z: Tensor
    """(g,) sum of the squared log-sum-exp of the logits"""
    entropy: Tensor
    """(g,) sum of the probabilities' entropy in nats; without gradient"""


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    valid: Tensor | None = None,
    groups: int = 1,
    *,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> Routed:
    """A top-k router: its choices, and for each routing group the sums that its losses are made of.

    In float32 whatever x's dtype, also under `torch.autocast`. Gradients flow through gates, probabilities and z.

    Args:
        x: (t, d), cut into g groups of equally many consecutive tokens.
        weight: (e, d).
        bias: (e,) added to the scores for choosing alone.
        top_k: choices for each token, k.
        valid: (t,) 1 for tokens, 0 for padding, which is neither routed nor counted; None: all are tokens.
        groups: g.
        logit_bias: (e,) added to the logits.
        scores: what is made of the logits: "softmax" over all experts, or the "sigmoid" of each.
    """
    _expect(x, weight, bias, top_k, logit_bias, scores)
    expect("valid", valid, (x.shape[0],))
    if x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} tokens cannot be cut into {groups} equal groups")
    args = (x, weight, dense(bias), top_k, dense(valid), groups)
    return Routed(*compute("router", *args, *_more(logit_bias, scores)))


def router_choices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """The choices of `router` alone, of which none is dropped: for few tokens without gradients one kernel.

    Returns:
        indices (t, k) int64, gates (t, k) float32; float64 of float64.
    """
    if x.shape[0] > FEW or torch.is_grad_enabled():
        return router(x, weight, bias, top_k, logit_bias=logit_bias, scores=scores)[:2]
    _expect(x, weight, bias, top_k, logit_bias, scores)
    return compute("router_choices", x, weight, dense(bias), top_k, *_more(logit_bias, scores))


def prepare_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    indices: Tensor,
    gates: Tensor,
    *,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> Callable[[int], None] | None:
    """`router_choices` over and over for the first rows of the same buffers, with all looked up beforehand.

    Args:
        x, indices, gates: (rows, d), and (rows, k) twice, int64 and float32.
        weight, bias, logit_bias, scores: as there; tensors may be changed in place but have to stay where they are.
    Returns:
        a function of how many rows, whose indices and gates it writes; None where there is none.
    """
    _expect(x, weight, bias, indices.shape[1], logit_bias, scores)
    if choose("router_choices", x) != "cpu":
        return None
    from .cpu import prepare

    return prepare(x, weight, bias, indices, gates, logit_bias, scores)


def router_means(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The choices of `router`, and what they come to where all tokens are one group (see `layers.RouterStats`).

    Returns:
        indices (t, k) int64, the likeliest first; gates (t, k), their scores; balance_loss (), z_loss (),
        load (e,) choices that fell on each expert, entropy ().
    """
    _expect(x, weight, bias, top_k, logit_bias, scores)
    logits = linear_float32(x, weight)
    if logit_bias is not None:
        logits = logits + logit_bias.to(logits.dtype)
    return route_with_stats(logits, bias, top_k, scores)


def route_with_stats(
    logits: Tensor, bias: Tensor, top_k: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `router_means`, of logits (t, e) float32."""
    n_experts = sizes("logits", logits, "t, e")[1]
    expect("bias", bias, (n_experts,))
    _expect_choices(top_k, n_experts)
    return compute("router_means", logits, bias, top_k, *(() if scores == "softmax" else (scores,)))


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float32 whatever x's dtype, also under `torch.autocast`: a router's logits.

    Args:
        x: (t, d).
        weight: (e, d).
    Returns:
        (t, e) float32; float64 of float64.
    """
    expect("weight", weight, (weight.shape[0], sizes("x", x, "t, d")[1]))
    return compute("router_logits", x, weight)


def _more(logit_bias: Tensor | None, scores: str) -> tuple[Any, ...]:
    """The arguments that not every backend knows, where they are asked for."""
    return () if logit_bias is None and scores == "softmax" else (dense(logit_bias), scores)


def _expect(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, logit_bias: Tensor | None = None, scores: str = "softmax"
) -> None:
    expect("weight", weight, (weight.shape[0], sizes("x", x, "t, d")[1]))
    expect("bias", bias, (weight.shape[0],))
    expect("logit_bias", logit_bias, (weight.shape[0],))
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f'scores is {scores!r}; a router knows "softmax" and "sigmoid"')
    _expect_choices(top_k, weight.shape[0])


def _expect_choices(top_k: int, n_experts: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; of {n_experts} experts a token can choose 1 to {n_experts}")


def _without_more(count: int) -> Callable[..., str | None]:
    """Of a door that knows the first `count` arguments alone."""

    def supports(*arguments: Any) -> str | None:
        if len(arguments) <= count:
            return None
        return "its scores are those of softmax" if arguments[-1] != "softmax" else "its logits have no bias"

    return supports


def _router_triton() -> Callable[..., Any]:
    from .triton import route_with_totals

    return route_with_totals


def _choices_triton() -> Callable[..., Any]:
    from .triton_few import route

    return route


def _router_cpu() -> Callable[..., Any]:
    from .cpu import route_with_totals

    return route_with_totals


def _choices_cpu() -> Callable[..., Any]:
    from .cpu import route

    return route


def _logits_cpu() -> Callable[..., Any]:
    from .cpu import linear_float32

    return linear_float32


def _means_cpu() -> Callable[..., Any]:
    from .cpu import route_with_stats

    return route_with_stats


def _logits_triton() -> Callable[..., Any]:
    from .triton_few import linear_float32

    return linear_float32


_ALONE = "no gradient"
declare(
    "router",
    reference.route_with_totals,
    cpu=Door(_router_cpu, holds=_ALONE),
    triton=Door(_router_triton, supports=_without_more(6)),
)
declare(
    "router_choices",
    reference.route,
    cpu=Door(_choices_cpu, holds=_ALONE),
    triton=Door(_choices_triton, holds=_ALONE, supports=_without_more(4)),
)
declare("router_means", reference.route_with_stats, cpu=Door(_means_cpu, holds=_ALONE))
declare("router_logits", reference.linear_float32, cpu=Door(_logits_cpu, holds=_ALONE), triton=Door(_logits_triton))
