"""One position of a whole Mamba layer on the CPU, for any number of rows, with the bits of the ops one by one.

The weights stream past once, whatever the number of rows; all else lies side by side by channel: states, decays and the
convolution's taps. What takes several threads is cut by channels, in four phases.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import (
    LOG2E,
    TILE,
    by_channel,
    exact,
    exact_kernel,
    floats,
    fma,
    gated,
    located,
    new,
    next_state,
    run,
    silu,
    softplus,
)
from ..kit.cpu.product import MULTIPLICATIONS, product
from ..kit.cpu.run import WORTH_THREADS
from ..kit.op import traced
from . import reference

SHARE = 16  # rows of a projection that are a task

Sizes = tuple[int, int, int, int, int, int]
"""rows, d, width, n, k, r"""


def fits(x: Tensor) -> bool:
    """See `moemamba.ops.fuses_mamba_step`."""
    return x.dtype == torch.float32 and not (torch.is_grad_enabled() or traced(x))


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
    """See `moemamba.ops.mamba_step`; with a norm, and in place where states do not lie by channel, the reference's."""
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    done = None
    if norm_weight is None and not traced(x, *weights) and not torch.is_autocast_enabled("cpu"):
        done = _fused(x, conv_state, ssm_state, in_place, *weights)
    if done is None:
        return reference.mamba_step(
            x, conv_state, ssm_state, *weights, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, in_place=in_place
        )
    return done


def _fused(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_place: bool,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the kernel; None where it cannot read what it is given."""
    (batch, _, d), (width, n), k, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    before = by_channel(conv_state), by_channel(ssm_state)
    after = before if in_place else (new(*before[0].shape), new(*before[1].shape))
    if in_place and (before[0].data_ptr(), before[1].data_ptr()) != (conv_state.data_ptr(), ssm_state.data_ptr()):
        return None  # it is a copy that would be written to
    taps, decay = by_taps(conv_weight), decays(A_log)
    sizes, y = (batch, d, width, n, k, r), new(*x.shape)
    weights = (in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj)
    work = new(space(sizes))
    places = located(x, *weights, before[0], after[0], before[1], after[1], work, y)
    if places is None:
        return None
    launch(sizes, False, *places)
    return y, after[0].transpose(1, 2), after[1].transpose(1, 2)


def by_taps(conv_weight: Tensor) -> Tensor:
    """(k, i) of the convolution's weight (i, k)."""
    return conv_weight.t().contiguous()


def decays(A_log: Tensor) -> Tensor:
    """(n, i) of A_log (i, n): what the scan makes of it, so that a state decays by 2^(dt decay)."""
    return (-torch.exp(A_log)).t().contiguous().mul_(float(LOG2E))


def space(sizes: Sizes) -> int:
    """Numbers that a step keeps on the way."""
    rows, d, width, n, _, r = sizes
    return rows * (3 * width + r + 2 * n + d)


def launch(sizes: Sizes, adds: bool, *places: int) -> None:
    """A step over as many threads as it is worth. See `_step` for what lies where."""
    rows, d, width, n, _, r = sizes
    shares = (-(-width // TILE), -(-(r + 2 * n) // SHARE), -(-width // TILE), -(-d // SHARE))
    whole = rows * width * (3 * d + 2 * r + 2 * n) // MULTIPLICATIONS + rows * width * n
    if torch.get_num_threads() == 1 or whole < WORTH_THREADS:
        for phase, tasks in enumerate(shares):
            _step(0, tasks, phase, *sizes, adds, *places)
        return
    costs = (2 * d, r + 2 * n, r + MULTIPLICATIONS * n, d)
    for phase, (tasks, cost) in enumerate(zip(shares, costs, strict=True)):
        run(_step, tasks, rows * width * cost // MULTIPLICATIONS, phase, *sizes, adds, *places)


@exact
def _convolve(u: Any, total: Any, taps: Any, window: Any, moved: Any) -> None:
    """The convolution at one position with its activation, u in and out; `moved` becomes the window after it."""
    k = taps.shape[0]
    for tap in range(k - 1):
        for c in range(u.shape[0]):
            total[c] = fma(taps[tap, c], window[tap, c], total[c])
    for tap in range(k - 2):
        for c in range(u.shape[0]):
            moved[tap, c] = window[tap + 1, c]
    if k > 1:
        for c in range(u.shape[0]):
            moved[k - 2, c] = u[c]
    for c in range(u.shape[0]):
        u[c] = silu(fma(taps[k - 1, c], u[c], total[c]))


@exact
def _scan(u: Any, dt: Any, drive: Any, B: Any, C: Any, decay: Any, skip: Any, h: Any, after: Any) -> None:
    """u becomes C h + D u, with h the state after this position."""
    for c in range(u.shape[0]):
        drive[c] = dt[c] * u[c]
        u[c] = skip[c] * u[c]
    for s in range(B.shape[0]):
        for c in range(u.shape[0]):
            after[s, c] = next_state(h[s, c], dt[c], decay[s, c], drive[c], B[s])
            u[c] = fma(C[s], after[s, c], u[c])


@exact_kernel
def _step(
    first: int,
    last: int,
    phase: int,
    rows: int,
    d: int,
    width: int,
    n: int,
    k: int,
    r: int,
    adds: bool,
    x: int,
    in_proj: int,
    conv_weight: int,
    conv_bias: int,
    x_proj: int,
    dt_proj: int,
    dt_bias: int,
    decay: int,
    D: int,
    out_proj: int,
    conv_before: int,
    conv_after: int,
    ssm_before: int,
    ssm_after: int,
    work: int,
    y: int,
) -> None:
    """A share of a phase: into the convolution; what dt, B and C are chosen from; the scan; out, added to y or not.

    States are (b, k - 1, i) and (b, n, i), those after may be those before; `conv_weight` is (k, i), `decay` (n, i).
    """
    inner = work  # (rows, 2 width): u, and the gate
    step = inner + 8 * rows * width  # (rows, width) dt
    chosen = step + 4 * rows * width  # (rows, r + 2 n)
    made = chosen + 4 * rows * (r + 2 * n)  # (rows, d)
    across, wide, start, end = 4 * (r + 2 * n), 8 * width, first * TILE, min(last * TILE, width)
    spare = np.empty(width, np.float32)
    if phase == 0:
        product(start, end, rows, d, x, 4 * d, in_proj, 4 * d, inner, wide)
        product(width + start, width + end, rows, d, x, 4 * d, in_proj, 4 * d, inner, wide)
        taps, shift = floats(conv_weight, (k, width)), floats(conv_bias, (width,))
        for b in range(rows):
            place = 4 * b * (k - 1) * width
            window, moved = floats(conv_before + place, (k - 1, width)), floats(conv_after + place, (k - 1, width))
            for c in range(start, end):
                spare[c] = shift[c]
            u = floats(inner + b * wide, (width,))[start:end]
            _convolve(u, spare[start:end], taps[:, start:end], window[:, start:end], moved[:, start:end])
    elif phase == 1:
        first, last = first * SHARE, min(last * SHARE, r + 2 * n)
        product(first, last, rows, width, inner, wide, x_proj, 4 * width, chosen, across)
    elif phase == 2:
        product(start, end, rows, r, chosen, across, dt_proj, 4 * r, step, 4 * width)
        shift, rates, skip = floats(dt_bias, (width,)), floats(decay, (n, width)), floats(D, (width,))
        for b in range(rows):
            dt, own = floats(step + 4 * b * width, (width,)), floats(chosen + b * across, (r + 2 * n,))
            u, z = floats(inner + b * wide, (width,)), floats(inner + b * wide + 4 * width, (width,))
            for c in range(start, end):
                dt[c] = softplus(dt[c] + shift[c])
            place = 4 * b * n * width
            h, after = floats(ssm_before + place, (n, width)), floats(ssm_after + place, (n, width))
            _scan(
                u[start:end],
                dt[start:end],
                spare[start:end],
                own[r : r + n],
                own[r + n :],
                rates[:, start:end],
                skip[start:end],
                h[:, start:end],
                after[:, start:end],
            )
            for c in range(start, end):
                u[c] = gated(u[c], z[c])
    else:
        first, last = first * SHARE, min(last * SHARE, d)
        product(first, last, rows, width, inner, wide, out_proj, 4 * width, made if adds else y, 4 * d)
        if adds:
            for b in range(rows):
                source, target = floats(made + 4 * b * d, (d,)), floats(y + 4 * b * d, (d,))
                for c in range(first, last):
                    target[c] += source[c]
