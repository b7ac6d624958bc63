"""Pure functions on tensors: the operations that the layers are made of.

Each function here checks its arguments and hands them to a backend: "reference" (plain PyTorch, `reference.py`), "cpu"
(compiled loops, `cpu_*.py`), "triton" (GPU kernels, `triton_*.py`) or "cuda" (`cuda_*`: on NVIDIA GPUs the scan and the
convolution's gradients). All compute the same function with the same gradients. The fastest that can run is chosen
from the tensors; `backend("reference")` overrides the choice. The kernels know the backward pass alone: under
torch.func, and where an argument carries a forward-mode derivative, the choice is the reference, which is right there.

What is not of a sequence, padding or another sequence of its row, never reaches it, forward or backward, be it infinite
or not a number.

Letters, here and everywhere: b batch, l length, t tokens (b times l), d d_model, i d_inner, n d_state, k d_conv or
top_k, r dt_rank, e n_experts, f d_expert, v vocabulary. Upper-case A, B, C, D are only the state-space model's.
"""

from types import TracebackType

from torch import Tensor

from . import reference
from .arguments import autocast, dense, expect, sizes
from .attention import attention
from .backends import BACKENDS, available, bound, choose, compute, force, why_not
from .derivatives import transformed
from .routing import linear_float32, places_in_queues, route, route_with_stats, route_with_totals

__all__ = [
    "BACKENDS",
    "attention",
    "available",
    "backend",
    "bound",
    "causal_conv1d",
    "choose",
    "expert_feedforward",
    "expert_linear",
    "fuses_mamba_step",
    "grouped_linear",
    "linear",
    "linear_argmax",
    "linear_beside",
    "linear_cross_entropy",
    "linear_float32",
    "mamba_step",
    "places_in_queues",
    "rms_norm",
    "route",
    "route_with_stats",
    "route_with_totals",
    "selective_scan",
    "transformed",
    "why_not",
]


class backend:
    """Override the choice of backend: `with ops.backend("reference"): ...`, or a plain call, which lasts.

    In the context that asks (`contextvars`): other threads choose for themselves. What `torch.compile` has compiled
    keeps the choice of the context that compiled it.

    Raises:
        ValueError: the name is none of "reference", "cpu", "triton", "cuda".
        RuntimeError: that backend cannot run on this machine; the message says why and what to do.
    """

    def __init__(self, name: str | None):
        self.previous = force(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        force(self.previous)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective state-space recurrence (Mamba, arXiv 2312.00752, Algorithm 2 and section 3.3).

    `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = (C_t h_t + D u_t) silu(z_t)`, with `dt = softplus(dt + dt_bias)`.

    Args:
        u, dt, z: (b, l, i) input, step size before bias and softplus, and gate.
        A: (i, n) float32, negative.
        B, C: (b, l, n), shared by all channels.
        D, dt_bias: (i,) skip and step-size bias.
        dt_softplus: False if `dt` is positive already.
        initial_state: (b, i, n) state before the first position; zeros if None. Gradients flow into it.
        seq_idx: (b, l) sequence of each position: the state starts from zero where it changes, and where it is negative
            (padding) the state stays as it is and `y` is zero. `initial_state` belongs to the row's first sequence.
    Returns:
        y: (b, l, i) in u's dtype.
        final_state: (b, i, n) float32 state after the last position (of the row's last sequence).
    """
    batch, length, width = sizes("u", u, "b, l, i")
    n = sizes("A", A, "i, n")[1]
    expect("dt", dt, (batch, length, width))
    expect("A", A, (width, n))
    expect("B", B, (batch, length, n))
    expect("C", C, (batch, length, n))
    expect("D", D, (width,))
    expect("z", z, (batch, length, width))
    expect("dt_bias", dt_bias, (width,))
    expect("initial_state", initial_state, (batch, width, n))
    expect("seq_idx", seq_idx, (batch, length))
    D, dt_bias, seq_idx = dense(D), dense(dt_bias), dense(seq_idx)
    return compute("selective_scan", u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)


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


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One position of a whole Mamba layer, projections included: what `layers.Mamba` computes with its weights.

    No gradients where it is one kernel; see `fuses_mamba_step`.

    Args:
        x: (b, 1, d).
        conv_state: (b, i, k-1) last inputs of the convolution, oldest first.
        ssm_state: (b, i, n) float32.
        in_proj: (2i, d), the gate's rows last.
        conv_weight, conv_bias: (i, k), (i,).
        x_proj: (r + 2n, i), rows of dt, B and C.
        dt_proj, dt_bias: (i, r), (i,).
        A_log, D: (i, n), (i,).
        out_proj: (d, i).
        norm_weight: (d,) makes this the residual sub-layer `x + layer(norm(x))`, with the root-mean-square norm;
        norm_bias: (d,) with it the norm is layer normalisation.
        eps: of the norm.
        in_place: write the new states over the old ones, which must be contiguous, and return those.
    Returns:
        y (b, 1, d), conv_state, ssm_state.
    """
    batch, d = x.shape[0], x.shape[2]
    (width, n), k, r = A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    expect("x", x, (batch, 1, d))
    expect("conv_state", conv_state, (batch, width, k - 1))
    expect("ssm_state", ssm_state, (batch, width, n))
    expect("in_proj", in_proj, (2 * width, d))
    expect("conv_weight", conv_weight, (width, k))
    expect("conv_bias", conv_bias, (width,))
    expect("x_proj", x_proj, (r + 2 * n, width))
    expect("dt_proj", dt_proj, (width, r))
    expect("dt_bias", dt_bias, (width,))
    expect("D", D, (width,))
    expect("out_proj", out_proj, (d, width))
    expect("norm_weight", norm_weight, (d,))
    expect("norm_bias", norm_bias, (d,))
    if in_place and not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        raise ValueError("conv_state and ssm_state must be contiguous to be written in place; call contiguous() first")
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    norm = (norm_weight, norm_bias, eps, in_place)
    return compute("mamba_step", x, conv_state, ssm_state, *weights, *norm)  # type: ignore[no-any-return]


def fuses_mamba_step(x: Tensor, *weights: Tensor) -> bool:
    """Whether `mamba_step` has kernels of its own for such an x (b, 1, d) and weights, in `mamba_step`'s order."""
    match choose("mamba_step", x):  # imports are here, since kernels take their time to load
        case "cpu":
            from .cpu_step import fits as fits_cpu

            return fits_cpu(x)
        case "triton":
            from .triton_step import fits

            return fits(x, weights)
    return False


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


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """`y = sum_j gates_j W[indices_j] x`: linear experts over tokens in any order.

    Args:
        x: (t, d).
        indices: (t, k) int64, the experts chosen for each token; n_experts where a choice was dropped.
        gates: (t, k) float32 weight of each choice; one if None.
        weight: (e, o, d).
    Returns:
        (t, o) in x's dtype; zero for a token whose every choice was dropped.
    """
    tokens, d = sizes("x", x, "t, d")
    expect("weight", weight, (*weight.shape[:2], d))
    expect("indices", indices, (tokens, indices.shape[-1]))
    expect("gates", gates, tuple(indices.shape))
    x = autocast(x)
    return compute("expert_linear", x, dense(indices), dense(gates), weight)


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, *, activation: str = "relu"
) -> Tensor:
    """`y = sum_j gates_j E[indices_j](x)` with experts `E(x) = down activation(up x)` (arXiv 2101.03961, eq. 2).

    Args:
        x: (t, d).
        indices: (t, k) int64, the experts chosen for each token; n_experts where a choice was dropped.
        gates: (t, k) float32 weight of each choice; one if None.
        up: (e, f, d), or (e, 2f, d) for "swiglu": the gate's rows first.
        down: (e, o, f).
        activation: "relu", "gelu" (tanh approximation), "silu" or "swiglu".
    Returns:
        (t, o) in x's dtype; zero for a token whose every choice was dropped.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(reference.ACTIVATIONS)}")
    tokens, d = sizes("x", x, "t, d")
    n_experts, rows, _ = sizes("up", up, "e, f, d")
    expect("up", up, (n_experts, rows, d))
    expect("down", down, (n_experts, down.shape[1], rows // 2 if activation == "swiglu" else rows))
    expect("indices", indices, (tokens, indices.shape[-1]))
    expect("gates", gates, tuple(indices.shape))
    x = autocast(x)
    return compute("expert_feedforward", x, dense(indices), dense(gates), up, down, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: (..., d).
        weight: (f, d).
        bias: (f,).
    Returns:
        (..., f).
    """
    expect("weight", weight, (weight.shape[0], x.shape[-1]))
    expect("bias", bias, (weight.shape[0],))
    return compute("linear", x, weight, bias)  # type: ignore[no-any-return]


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x itself, for whoever else reads it, and `x @ weight.T`.

    The same as using x twice, but that its two gradients are added where the product of one is made.

    Args:
        x: (..., d).
        weight: (f, d).
    Returns:
        (..., d), and (..., f).
    """
    expect("weight", weight, (weight.shape[0], x.shape[-1]))
    return compute("linear_beside", x, weight)  # type: ignore[no-any-return]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against targets, without ever holding the (t, v) logits.

    Args:
        hidden: (t, d).
        weight: (v, d).
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
    return compute("linear_cross_entropy", hidden, weight, targets, ignore_index, reduction)


def linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    """The largest entry of `x @ weight.T` in each row, as x's dtype rounds it: the most likely token. No gradients.

    Args:
        x: (b, d).
        weight: (v, d).
    Returns:
        (b,) int64.
    """
    expect("weight", weight, (weight.shape[0], x.shape[1]))
    return compute("linear_argmax", x, weight)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """`x / sqrt(mean x^2 + eps) * weight` over the last dimension (arXiv 1910.07467, eq. 4).

    Args:
        x: (..., d).
        weight: (d,).
    Returns:
        (..., d) in x's dtype, or the weight's where that is wider.
    """
    expect("weight", weight, (x.shape[-1],))
    return compute("rms_norm", x, weight, eps)  # type: ignore[no-any-return]
