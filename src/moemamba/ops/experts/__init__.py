"""Expert layers: matrix products of rows sorted by who takes them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import autocast, dense, expect, sizes
from ..choice import Door, choose, compute, declare, readable
from ..kit.packed import Weight
from . import reference
from .reference import ACTIVATIONS as ACTIVATIONS  # what layers compute alone too

GATED = ("swiglu", "geglu")
"""activations whose first matrix has twice the rows, the gate's first"""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One matrix product a group: rows sorted by expert, each with its expert's matrix.

    Args:
        x: (t, d), the first `counts[0]` rows for expert 0, and so on.
        weight: (e, f, d).
        counts: (e,) integers, rows of each expert; their sum may fall short of t.
    Returns:
        (t, f) in x's dtype; zero in the rows that belong to no expert.
    """
    _, d = sizes("x", x, "t, d")
    expect("weight", weight, (*weight.shape[:2], d))
    expect("counts", counts, (weight.shape[0],))
    x = autocast(x)
    return compute("grouped_linear", x, weight, counts)


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Weight) -> Tensor:
    """`y = sum_j gates_j W[indices_j] x`: linear experts over tokens in any order.

    Args:
        x: (t, d).
        indices: (t, k) int64, the experts chosen for each token; n_experts where a choice was dropped.
        gates: (t, k) float32 weight of each choice; one if None.
        weight: (e, o, d), also of 8 bits: see `ops.linear`.
    Returns:
        (t, o) in x's dtype; zero for a token whose every choice was dropped.
    """
    tokens, d = sizes("x", x, "t, d")
    expect("weight", weight, (*weight.shape[:2], d))
    expect("indices", indices, (tokens, indices.shape[-1]))
    expect("gates", gates, tuple(indices.shape))
    x = autocast(x)
    (weight,) = readable("expert_linear", x, weight)
    return compute("expert_linear", x, dense(indices), dense(gates), weight)


def expert_feedforward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    up: Weight,
    down: Weight,
    *,
    activation: str = "relu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`y = sum_j gates_j E[indices_j](x)` with experts `E(x) = down activation(up x)` (arXiv 2101.03961, eq. 2).

    Args:
        x: (t, d).
        indices: (t, k) int64, the experts chosen for each token; n_experts where a choice was dropped.
        gates: (t, k) float32 weight of each choice; one if None.
        up: (e, f, d), or (e, 2f, d) for gated activations: the gate's rows first.
        down: (e, o, f). Both may be of 8 bits: see `ops.linear`.
        activation: "relu", "gelu" (tanh approximation), "gelu_erf", "silu", "relu2" (the square of relu), or gated
            "swiglu" or "geglu" (exact): the activated first half of `up x`, times its second half.
        up_bias, down_bias: (e, f) or (e, 2f), and (e, o), added to the products.
    Returns:
        (t, o) in x's dtype; zero for a token whose every choice was dropped.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    tokens, d = sizes("x", x, "t, d")
    n_experts, rows, _ = sizes("up", up, "e, f, d")
    expect("up", up, (n_experts, rows, d))
    expect("down", down, (n_experts, down.shape[1], rows // 2 if activation in GATED else rows))
    expect("indices", indices, (tokens, indices.shape[-1]))
    expect("gates", gates, tuple(indices.shape))
    expect("up_bias", up_bias, (n_experts, rows))
    expect("down_bias", down_bias, down.shape[:2])
    x = autocast(x)
    up, down = readable("expert_feedforward", x, up, down)
    biases = () if up_bias is None and down_bias is None else (up_bias, down_bias)
    return compute("expert_feedforward", x, dense(indices), dense(gates), up, down, activation, *biases)


def prepare_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    up: Weight,
    down: Weight,
    y: Tensor,
    *,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Callable[[int], None] | None:
    """`expert_feedforward` over and over for the first rows of the same buffers, with all looked up beforehand.

    Args:
        x, y: (rows, d), (rows, o).
        indices, gates: (rows, k), filled before each call.
        up, down, activation, up_bias, down_bias: as there; tensors may be changed in place but have to stay where they
            are.
    Returns:
        a function of how many rows: to their y it adds what their experts return; None where there is none.
    """
    if choose("expert_feedforward", x) != "cpu":
        return None
    from .cpu_exact import ACTIVATIONS, prepare

    return prepare(x, indices, gates, up, down, ACTIVATIONS[activation], y, up_bias, down_bias)


def activate(x: Tensor, activation: str) -> Tensor:
    """What stands between the two matrices of a feed-forward network.

    Args:
        x: (..., f), or (..., 2f) for gated ones: the gate first.
        activation: see `expert_feedforward`.
    Returns:
        (..., f).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    return compute("activate", x, activation)


def places_in_queues(queues: Tensor, n_queues: int) -> Tensor:
    """How many entries before each one equal it: the place of each in the queue that it names.

    Args:
        queues: (t,) int64, less than n_queues.
    Returns:
        (t,) int64.
    """
    return compute("places_in_queues", queues, n_queues)  # type: ignore[no-any-return]


def _known_to_triton(*arguments: Any) -> str | None:
    if len(arguments) > 5 and arguments[5] not in ("relu", "gelu", "silu", "swiglu"):
        return f"its kernels know no {arguments[5]}"
    return "its experts have no biases" if any(bias is not None for bias in arguments[6:]) else None


def _feedforward_cpu() -> Callable[..., Any]:
    from .cpu import expert_feedforward

    return expert_feedforward


def _feedforward_triton() -> Callable[..., Any]:
    from .triton import expert_feedforward

    return expert_feedforward


def _activate_cpu() -> Callable[..., Any]:
    from .cpu import activate

    return activate


def _linear_cpu() -> Callable[..., Any]:
    from .cpu import expert_linear

    return expert_linear


def _linear_triton() -> Callable[..., Any]:
    from .triton_linear import expert_linear

    return expert_linear


def _grouped_cpu() -> Callable[..., Any]:
    from .cpu import grouped_linear

    return grouped_linear


def _grouped_triton() -> Callable[..., Any]:
    from .triton_linear import grouped_linear

    return grouped_linear


def _places_triton() -> Callable[..., Any]:
    from .triton_sort import places_in_queues

    return places_in_queues


declare(
    "expert_feedforward",
    reference.expert_feedforward,
    cpu=Door(_feedforward_cpu),
    triton=Door(_feedforward_triton, supports=_known_to_triton),
)
declare("expert_linear", reference.expert_linear, cpu=Door(_linear_cpu), triton=Door(_linear_triton))
declare("grouped_linear", reference.grouped_linear, cpu=Door(_grouped_cpu), triton=Door(_grouped_triton))
declare("places_in_queues", reference.places_in_queues, triton=Door(_places_triton, holds="no gradient"))
declare("activate", reference.activate, cpu=Door(_activate_cpu, holds="no gradient"))
