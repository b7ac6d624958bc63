"""TODO"""

from torch import Tensor

from ..arguments import dense, expect, sizes
from ..choice import compute


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
