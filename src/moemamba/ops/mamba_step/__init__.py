"""One position of a whole Mamba layer, and the most likely token after the last."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import expect
from ..choice import Door, choose, compute, declare, readable
from ..kit.packed import Packed, Weight
from . import reference
from .reference import Inner as Inner  # what layers hand over


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Weight,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Weight,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Weight,
    inner: reference.Inner | None = None,
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
        in_proj: (2i, d), the gate's rows last; this, x_proj and out_proj may be of 8 bits, see `ops.linear`.
        conv_weight, conv_bias: (i, k), (i,).
        x_proj: (r + 2n, i), rows of dt, B and C.
        dt_proj, dt_bias: (i, r), (i,).
        A_log, D: (i, n), (i,).
        out_proj: (d, i).
        inner: the norms of dt, B and C.
        norm_weight: (d,) makes this the residual sub-layer `x + layer(norm(x))`, with the root-mean-square norm;
        norm_bias: (d,) with it the norm is layer normalisation.
        eps: of the norm.
        in_place: write the new states over the old ones, which on a GPU must be contiguous, and return those.
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
    dense = conv_state.is_contiguous() and ssm_state.is_contiguous()
    if in_place and not dense and choose("mamba_step", x) != "cpu":  # whose states lie by channel
        raise ValueError("conv_state and ssm_state must be contiguous to be written in place; call contiguous() first")
    for name, width in (("dt", r), ("B", n), ("C", n)) if inner else ():
        expect(f"inner.{name}", getattr(inner, name), (width,))
    in_proj, x_proj, out_proj = readable("mamba_step", x, in_proj, x_proj, out_proj)
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, inner)
    norm = (norm_weight, norm_bias, eps, in_place)
    return compute("mamba_step", x, conv_state, ssm_state, *weights, *norm)  # type: ignore[no-any-return]


def prepare_mamba_step(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: tuple[Any, ...], y: Tensor
) -> Callable[[int], None] | None:
    """`mamba_step` over and over for the first rows of the same buffers, with all looked up beforehand.

    Args:
        x, y: (rows, d).
        conv_state, ssm_state: (rows, i, k-1), (rows, i, n), overwritten by each step.
        weights: those of `mamba_step` up to `inner`, in its order, which may be changed in place but have to stay where
            they are.
    Returns:
        a function of how many rows: to their y it adds what the layer makes of their x; None where there is none.
    """
    if choose("mamba_step", x) != "cpu":
        return None
    from .cpu import prepare

    return prepare(x, conv_state, ssm_state, weights, y)


def mamba_step_of(
    weights: tuple[Any, ...], window: int, norm: tuple[Tensor, float] | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """`mamba_step` over and over with the same weights, and other inputs and states each time.

    Args:
        weights: those of `mamba_step` up to `inner`, in its order, which may be changed in place, in any way, but have
            to stay where they are.
        window: how many last inputs of the convolution a state holds, k - 1 or more.
        norm: weight (d,) and eps; with it the function is the residual sub-layer `x + layer(norm(x))`.
    Returns:
        a function of x (b, 1, d), and of states with channels last, conv_state (b, window, i) and ssm_state (b, n, i),
        which are overwritten: it returns y (b, 1, d), or None where it cannot read these and has done nothing. None
        where there is no such function.
    """
    if choose("mamba_step", weights[0]) != "cpu":
        return None
    from .cpu import step_of

    return step_of(weights, window, norm)


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


def fuses_mamba_step(x: Tensor, *weights: Any) -> bool:
    """Whether `mamba_step` has kernels of its own for such an x (b, 1, d) and weights, in `mamba_step`'s order."""
    chosen = choose("mamba_step", x)
    if chosen != "cpu" and any(isinstance(weight, Packed) for weight in weights):
        return False
    fits = _FITS.get(chosen)
    return fits is not None and fits(x, weights)


def _without_norms_inside(*arguments: Any) -> str | None:
    return "it has no norms of dt, B and C" if any(isinstance(a, reference.Inner) for a in arguments[12:13]) else None


def _fits_cpu(x: Tensor, weights: tuple[Any, ...]) -> bool:
    from .cpu import fits

    return fits(x)


def _fits_triton(x: Tensor, weights: tuple[Any, ...]) -> bool:
    from .triton import fits

    return not any(isinstance(weight, reference.Inner) for weight in weights) and fits(x, weights[:9])


_FITS = {"cpu": _fits_cpu, "triton": _fits_triton}


def _cpu() -> Callable[..., Any]:
    from .cpu import mamba_step

    return mamba_step


def _argmax_triton() -> Callable[..., Any]:
    from .triton import linear_argmax

    return linear_argmax


def _triton() -> Callable[..., Any]:
    from .triton import mamba_step

    return mamba_step


declare(
    "mamba_step",
    reference.mamba_step,
    cpu=Door(_cpu, holds="no gradient"),
    triton=Door(_triton, holds="no gradient", supports=_without_norms_inside),
)
declare("linear_argmax", reference.linear_argmax, triton=Door(_argmax_triton, holds="no gradient"))
