"""The selective state-space scan."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import dense, expect, sizes
from ..choice import Door, compute, declare, forced, why_not
from . import reference


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


def _cpu() -> Callable[..., Any]:
    from .cpu import selective_scan

    return selective_scan


def _triton() -> Callable[..., Any]:
    from .triton import selective_scan

    return selective_scan


def _cuda() -> Callable[..., Any]:
    from .cuda import selective_scan

    return selective_scan if forced() == "cuda" else _where_cuda_holds


def _where_cuda_holds(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, *rest: Any
) -> Any:
    """The scan in CUDA where nobody asked for it: what its kernels do not cover, others do."""
    from .cuda import selective_scan
    from .cuda import why_not as why_not_these

    if why_not_these(u, dt, A, B, C, z) is None:
        scan: Callable[..., Any] = selective_scan
    else:
        scan = reference.selective_scan if why_not("triton", u.device.type) else _triton()
    return scan(u, dt, A, B, C, D, z, *rest)


declare("selective_scan", reference.selective_scan, cpu=Door(_cpu), cuda=Door(_cuda), triton=Door(_triton))
