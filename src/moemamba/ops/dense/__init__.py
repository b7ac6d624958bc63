"""Linear layers and the norm."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import expect
from ..choice import Door, choose, compute, declare, readable
from ..experts import ACTIVATIONS
from ..kit.packed import Weight
from . import reference


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: (..., d).
        weight: (f, d); of 8 bits (`ops.Packed`) it has kernels on the CPU, and is made dense elsewhere.
        bias: (f,).
    Returns:
        (..., f).
    Raises:
        RuntimeError: a gradient is wanted through weights of 8 bits.
    """
    expect("weight", weight, (weight.shape[0], x.shape[-1]))
    expect("bias", bias, (weight.shape[0],))
    (weight,) = readable("linear", x, weight)
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


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`x / sqrt(mean x^2 + eps) * weight` over the last dimension (arXiv 1910.07467, eq. 4).

    Args:
        x: (..., d).
        weight: (d,); ones if None.
    Returns:
        (..., d) in x's dtype, or the weight's where that is wider.
    """
    expect("weight", weight, (x.shape[-1],))
    return compute("rms_norm", x, weight, eps)  # type: ignore[no-any-return]


def prepare_rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Callable[[int], None] | None:
    """`rms_norm` over and over for the first rows of x (rows, d), with all looked up beforehand.

    Returns:
        a function of how many rows, whose y (rows, d) it writes; None where there is none.
    """
    if choose("rms_norm", x) != "cpu":
        return None
    from .cpu_norm import prepare

    return prepare(x, weight, eps, y)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """`activation(norm(x) @ weight.T + bias)`: how a sub-layer of one decoded token begins. No gradients.

    Args:
        x: (b, d).
        weight, bias: (f, d), (f,); of gated activations 2f, the gate's first.
        norm_weight: (d,) of the root-mean-square norm; norm_bias: (d,) with it of layer normalisation; None: no norm.
        activation: see `ops.expert_feedforward`; None: none.
    Returns:
        (b, f).
    """
    expect("weight", weight, (weight.shape[0], x.shape[-1]))
    expect("bias", bias, (weight.shape[0],))
    expect("norm_weight", norm_weight, (x.shape[-1],))
    expect("norm_bias", norm_bias, (x.shape[-1],))
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    arguments = (x, weight, bias, norm_weight, norm_bias, eps, activation)
    return compute("norm_linear", *arguments)  # type: ignore[no-any-return]


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual + x @ weight.T + bias`: how a sub-layer of one decoded token ends. No gradients.

    Args:
        x: (b, f).
        weight, bias: (d, f), (d,).
        residual: (b, d).
    Returns:
        (b, d).
    """
    expect("weight", weight, (weight.shape[0], x.shape[-1]))
    expect("bias", bias, (weight.shape[0],))
    expect("residual", residual, (x.shape[0], weight.shape[0]))
    return compute("linear_add", x, weight, bias, residual)  # type: ignore[no-any-return]


def _supports_step(x: Tensor, *others: Any) -> str | None:
    return (
        f"its weights are of {others[0].dtype}, and x of {x.dtype}" if others and others[0].dtype != x.dtype else None
    )


def _norm_linear_triton() -> Callable[..., Any]:
    from .triton_step import norm_linear

    return norm_linear


def _linear_add_triton() -> Callable[..., Any]:
    from .triton_step import linear_add

    return linear_add


def _linear_cpu() -> Callable[..., Any]:
    from ..kit.cpu.product import linear

    return linear


def _linear_beside_triton() -> Callable[..., Any]:
    from .triton import linear_beside

    return linear_beside


def _rms_norm_cpu() -> Callable[..., Any]:
    from .cpu_norm import rms_norm

    return rms_norm


declare("linear", reference.linear, cpu=Door(_linear_cpu))
declare("linear_beside", reference.linear_beside, triton=Door(_linear_beside_triton))
declare("rms_norm", reference.rms_norm, cpu=Door(_rms_norm_cpu))
_STEP = {"holds": "no gradient", "supports": _supports_step, "asked": True}
declare("norm_linear", reference.norm_linear, triton=Door(_norm_linear_triton, **_STEP))  # type: ignore[arg-type]
declare("linear_add", reference.linear_add, triton=Door(_linear_add_triton, **_STEP))  # type: ignore[arg-type]
