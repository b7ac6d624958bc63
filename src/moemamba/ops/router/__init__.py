"""The public ops of routers; see `moemamba.ops`."""

from torch import Tensor

from ..arguments import dense, expect, sizes
from ..choice import compute


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float32 whatever x's dtype, also under `torch.autocast`: a router's logits.

    Args:
        x: (t, d).
        weight: (e, d).
    Returns:
        (t, e) float32; float64 of float64.
    """
    expect("weight", weight, (weight.shape[0], sizes("x", x, "t, d")[1]))
    return compute("linear_float32", x, weight)


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts that tokens visit, and how probable each was: a softmax router without gradients, losses or drops.

    Args:
        x: (t, d).
        weight: (e, d).
        bias: (e,) added to the probabilities when choosing.
        top_k: choices for each token, k.
    Returns:
        indices (t, k) int64, gates (t, k) float32; float64 of float64.
    """
    expect("weight", weight, (weight.shape[0], sizes("x", x, "t, d")[1]))
    expect("bias", bias, (weight.shape[0],))
    _expect_choices(top_k, weight.shape[0])
    return compute("route", x, weight, dense(bias), top_k)  # type: ignore[no-any-return]


def route_with_stats(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The choices of a softmax top-k router that drops nothing, and what they come to (see `layers.RouterStats`).

    Args:
        logits: (t, e) float32.
        bias: (e,) added to the probabilities for choosing alone.
        top_k: choices for each token, k.
    Returns:
        indices (t, k) int64, the likeliest first; gates (t, k), their probabilities; balance_loss (), z_loss (),
        load (e,) choices that fell on each expert, entropy ().
    """
    n_experts = sizes("logits", logits, "t, e")[1]
    expect("bias", bias, (n_experts,))
    _expect_choices(top_k, n_experts)
    return compute("route_with_stats", logits, bias, top_k)  # type: ignore[no-any-return]


def route_with_totals(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None = None, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A softmax top-k router: its choices, and for each routing group the sums that its losses are made of.

    In float32 whatever x's dtype, also under `torch.autocast`. Gradients flow through gates, probabilities and z.

    Args:
        x: (t, d), cut into g groups of equally many consecutive tokens.
        weight: (e, d).
        bias: (e,) added to the probabilities for choosing alone.
        top_k: choices for each token, k.
        valid: (t,) 1 for tokens, 0 for padding, which is neither routed nor counted; None: all are tokens.
        groups: g.
    Returns:
        indices: (t, k) int64, the likeliest first; n_experts at padding.
        gates: (t, k) float32, their probabilities; 0 at padding.
        load: (g, e) float32 choices that fell on each expert.
        probabilities: (g, e) sum of the tokens' probabilities.
        z: (g,) sum of the squared log-sum-exp of the logits.
        entropy: (g,) sum of the probabilities' entropy in nats; without gradient.
    """
    expect("weight", weight, (weight.shape[0], sizes("x", x, "t, d")[1]))
    expect("bias", bias, (weight.shape[0],))
    expect("valid", valid, (x.shape[0],))
    _expect_choices(top_k, weight.shape[0])
    if x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} tokens cannot be cut into {groups} equal groups")
    return compute("route_with_totals", x, weight, dense(bias), top_k, dense(valid), groups)  # type: ignore[no-any-return]


def places_in_queues(queues: Tensor, n_queues: int) -> Tensor:
    """How many entries before each one equal it: the place of each in the queue that it names.

    Args:
        queues: (t,) int64, less than n_queues.
    Returns:
        (t,) int64.
    """
    return compute("places_in_queues", queues, n_queues)  # type: ignore[no-any-return]


def _expect_choices(top_k: int, n_experts: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; of {n_experts} experts a token can choose 1 to {n_experts}")
