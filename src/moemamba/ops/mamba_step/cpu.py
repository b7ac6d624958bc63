"""One position of a whole Mamba layer on the CPU as one kernel, on one thread.

A generated token is a few microseconds of arithmetic a layer, so it costs what its calls cost and what reading the
weights once does: here nothing but the weights and the states leaves the first cache.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import LOG2E, exp2, floats, kernel, located, new, plain, sigmoid, softplus, summing, traced
from ..kit.cpu.product import FEW, product
from . import reference

LANES = 16  # states that are taken at once: as many as a vector register holds, and as many as most models have
WIDEST = 1024  # d_model up to which one thread is enough: more weights than that are no longer in a cache

_ZERO = np.float32(0)


def fits(x: Tensor) -> bool:
    """See `moemamba.ops.fuses_mamba_step`."""
    few, d = FEW * x.shape[-1], x.shape[-1]
    return x.numel() <= few and d <= WIDEST and x.dtype == torch.float32 and not (torch.is_grad_enabled() or traced(x))


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
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`; with a norm or in place it is the reference's."""
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    (batch, _, d), (width, n), k, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    before, places = (plain(conv_state), plain(ssm_state)), None
    if norm_weight is None and not in_place and not traced(x, *weights) and not torch.is_autocast_enabled("cpu"):
        after = (new(*x.shape), new(*before[0].shape), new(*before[1].shape))
        places = located(x, *before, *weights, *after)
    if places is None:
        return reference.mamba_step(
            x, conv_state, ssm_state, *weights, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, in_place=in_place
        )
    _step(0, batch, d, width, n, k, r, *places)
    return after


@summing
def _scan(u: Any, dt: Any, B: Any, C: Any, A_log: int, D: int, h: int, after: int) -> None:
    """u becomes C h + D u, with h the state after this position."""
    width, n = u.shape[0], B.shape[0]
    skip = floats(D, (width,))
    for c in range(width):
        drive, total, step = dt[c] * u[c], skip[c] * u[c], -LOG2E * dt[c]
        for s in range(0, n - LANES + 1, LANES):  # a loop of fixed length becomes straight code
            place = 4 * (c * n + s)
            a, old, new = floats(A_log + place, LANES), floats(h + place, LANES), floats(after + place, LANES)
            for j in range(LANES):
                value = exp2(step * exp2(LOG2E * a[j])) * old[j] + drive * B[s + j]
                new[j] = value
                total += value * C[s + j]
        first = n // LANES * LANES
        place = 4 * (c * n + first)
        rest = (n - first,)
        a, old, new = floats(A_log + place, rest), floats(h + place, rest), floats(after + place, rest)
        for j in range(n - first):
            value = exp2(step * exp2(LOG2E * a[j])) * old[j] + drive * B[first + j]
            new[j] = value
            total += value * C[first + j]
        u[c] = total


@kernel
def _step(
    first: int,
    last: int,
    d: int,
    width: int,
    n: int,
    k: int,
    r: int,
    x: int,
    conv_state: int,
    ssm_state: int,
    in_proj: int,
    conv_weight: int,
    conv_bias: int,
    x_proj: int,
    dt_proj: int,
    dt_bias: int,
    A_log: int,
    D: int,
    out_proj: int,
    y: int,
    conv_after: int,
    ssm_after: int,
) -> None:
    """Rows first .. last - 1."""
    inner, dt = np.empty(2 * width, np.float32), np.empty(width, np.float32)
    chosen = np.empty(r + 2 * n, np.float32)  # what depends on the input: the step size's r numbers, B and C
    u, z = inner[:width], inner[width:]
    taps, shift = floats(conv_weight, (width, k)), floats(conv_bias, (width,))
    dt_shift = floats(dt_bias, (width,))
    for b in range(first, last):
        product(inner, in_proj, floats(x + 4 * b * d, (d,)))
        place = 4 * b * width * (k - 1)
        window, moved = floats(conv_state + place, (width, k - 1)), floats(conv_after + place, (width, k - 1))
        for c in range(width):
            total = shift[c] + taps[c, k - 1] * u[c]
            for tap in range(k - 1):
                total += taps[c, tap] * window[c, tap]
            for tap in range(k - 2):
                moved[c, tap] = window[c, tap + 1]
            if k > 1:
                moved[c, k - 2] = u[c]
            u[c] = total
        for c in range(width):
            u[c] *= sigmoid(u[c])
        product(chosen, x_proj, u)
        product(dt, dt_proj, chosen[:r])
        for c in range(width):
            dt[c] = softplus(dt[c] + dt_shift[c])
        place = 4 * b * width * n
        _scan(u, dt, chosen[r : r + n], chosen[r + n :], A_log, D, ssm_state + place, ssm_after + place)
        for c in range(width):
            u[c] *= z[c] * sigmoid(z[c])
        product(floats(y + 4 * b * d, (d,)), out_proj, u)
