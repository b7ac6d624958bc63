"""One position of a whole Mamba layer on the CPU, for any number of rows, with the bits of the ops one by one.

The weights stream past once, whatever the number of rows; all else lies side by side by channel: states, decays and the
convolution's taps. What takes several threads is cut by channels, in four phases.
"""

from collections.abc import Callable
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
from ..kit.cpu.lanes import tile
from ..kit.cpu.product import MULTIPLICATIONS, product
from ..kit.cpu.run import WORTH_THREADS
from ..kit.op import traced
from . import reference

SHARE = 16  # rows of a projection that are a task
NORMS = 4  # a phase that most layers have not

_ONE = np.float32(1)
_dot = tile(1, 1)

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
    inner: reference.Inner | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`; with a norm, and in place where states do not lie by channel, the reference's."""
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, inner)
    done = None
    if norm_weight is None and not traced(x, *weights, *(inner or ())) and not torch.is_autocast_enabled("cpu"):
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
    inner: reference.Inner | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the kernel; None where it cannot read what it is given."""
    (batch, _, d), (width, n), k, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    before = by_channel(conv_state), by_channel(ssm_state)
    after = before if in_place else (new(*before[0].shape), new(*before[1].shape))
    if in_place and (before[0].data_ptr(), before[1].data_ptr()) != (conv_state.data_ptr(), ssm_state.data_ptr()):
        return None  # it is a copy that would be written to
    taps, decay = by_taps(conv_weight), decays(A_log)
    sizes, y = (batch, d, width, n, k, r), new(*x.shape)
    weights = (in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj, *_norms(inner))
    work = new(space(sizes))
    places = located(x, *weights, before[0], after[0], before[1], after[1], work, y)
    if places is None:
        return None
    launch(sizes, False, -1.0 if inner is None else inner.eps, *places)
    return y, after[0].transpose(1, 2), after[1].transpose(1, 2)


def _norms(inner: reference.Inner | None) -> tuple[Tensor | None, ...]:
    """Weights of the norms of dt, B and C."""
    return (None, None, None) if inner is None else inner[:3]


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


def launch(sizes: Sizes, adds: bool, eps: float, *places: int) -> None:
    """A step over as many threads as it is worth. See `_step` for what lies where."""
    rows, d, width, n, _, r = sizes
    whole = rows * width * (3 * d + 2 * r + 2 * n) // MULTIPLICATIONS + rows * width * n
    if whole < WORTH_THREADS or torch.get_num_threads() == 1:
        _alone(0, 1, *sizes, adds, eps, *places)
        return
    costs = (2 * d, r + 2 * n, r + MULTIPLICATIONS * n, d)
    shares = (-(-width // TILE), -(-(r + 2 * n) // SHARE), -(-width // TILE), -(-d // SHARE))
    for phase, (tasks, cost) in enumerate(zip(shares, costs, strict=True)):
        if phase == 2 and eps >= 0:
            _step(0, 1, NORMS, *sizes, adds, eps, *places)
        run(_step, tasks, rows * width * cost // MULTIPLICATIONS, phase, *sizes, adds, eps, *places)


def prepare(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: tuple[Any, ...], y: Tensor
) -> Callable[[int], None] | None:
    """See `moemamba.ops.prepare_mamba_step`."""
    in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, inner = weights
    before = by_channel(conv_state), by_channel(ssm_state)
    if (before[0].data_ptr(), before[1].data_ptr()) != (conv_state.data_ptr(), ssm_state.data_ptr()):
        return None
    if conv_weight.is_inference() or A_log.is_inference():
        return None  # it could not be seen that they have changed
    taps, decay = by_taps(conv_weight), decays(A_log)
    (rows, d), (width, n), k, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    work = new(space((rows, d, width, n, k, r)))
    read = (x, in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj, *_norms(inner))
    eps = -1.0 if inner is None else inner.eps
    tensors = (*read, before[0], before[0], before[1], before[1], work, y)
    places = located(*tensors)
    if places is None:
        return None
    made = [conv_weight._version, A_log._version]

    def step(live: int) -> None:
        if made != [conv_weight._version, A_log._version]:
            made[:] = conv_weight._version, A_log._version
            taps.copy_(by_taps(conv_weight))
            decay.copy_(decays(A_log))
        assert tensors  # and so are not freed
        launch((live, d, width, n, k, r), True, eps, *places)

    return step


# Loops are over vectors that each function makes of an address, and change them in place: of slices of matrices LLVM
# would not know the strides, and what two arrays may share it does not vectorise.


@exact
def _normalise(x: int, size: int, weight: int, eps: Any, total: Any) -> None:
    """As `ops.rms_norm` does, in place; without weights they are ones."""
    _dot(size, x, 0, x, 0, total.ctypes.data, 0)
    scale = _ONE / np.sqrt(total[0] / np.float32(size) + eps)
    own, shares = floats(x, size), floats(weight, size)
    for c in range(size):
        own[c] = own[c] * scale * shares[c] if weight else own[c] * scale


@exact
def _convolve(u: Any, total: Any, width: int, k: int, taps: int, bias: int, window: int) -> None:
    """The convolution at one position with its activation, u in and out; the window moves on.

    Addresses of the first of these channels in rows of `width`.
    """
    size = u.shape[0]
    shift = floats(bias, size)
    for c in range(size):
        total[c] = shift[c]
    for tap in range(k - 1):
        weight, old = floats(taps + 4 * tap * width, size), floats(window + 4 * tap * width, size)
        for c in range(size):
            total[c] = fma(weight[c], old[c], total[c])
    for tap in range(k - 2):
        place = window + 4 * tap * width
        older, old = floats(place, size), floats(place + 4 * width, size)
        for c in range(size):
            older[c] = old[c]
    if k > 1:
        last = floats(window + 4 * (k - 2) * width, size)
        for c in range(size):
            last[c] = u[c]
    weight = floats(taps + 4 * (k - 1) * width, size)
    for c in range(size):
        u[c] = silu(fma(weight[c], u[c], total[c]))


@exact
def _scan(u: Any, dt: Any, drive: Any, B: Any, C: Any, width: int, decay: int, D: int, state: int) -> None:
    """u becomes C h + D u, with h the state after this position."""
    size = u.shape[0]
    skip = floats(D, size)
    for c in range(size):
        drive[c] = dt[c] * u[c]
    for c in range(size):
        u[c] = skip[c] * u[c]
    for s in range(B.shape[0]):
        place = 4 * s * width
        rate, h, Bs, Cs = floats(decay + place, size), floats(state + place, size), B[s], C[s]
        for c in range(size):
            h[c] = next_state(h[c], dt[c], rate[c], drive[c], Bs)
        for c in range(size):
            u[c] = fma(Cs, h[c], u[c])


@exact
def _bring(before: int, after: int, rows: int, width: int, size: int) -> None:
    """Copy some channels of a state to where it is changed, if that is elsewhere."""
    for row in range(rows if before != after else 0):
        source, target = floats(before + 4 * row * width, size), floats(after + 4 * row * width, size)
        for c in range(size):
            target[c] = source[c]


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
    eps: float,
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
    dt_norm: int,
    B_norm: int,
    C_norm: int,
    conv_before: int,
    conv_after: int,
    ssm_before: int,
    ssm_after: int,
    work: int,
    y: int,
) -> None:
    """A share of a phase: into the convolution; what dt, B and C are chosen from; the scan; out, added to y or not.
    And NORMS of what was chosen, where `eps` is not negative: a phase before the scan.

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
        here = 4 * start
        for b in range(rows):
            history = 4 * b * (k - 1) * width + here
            u = floats(inner + b * wide + here, end - start)
            _bring(conv_before + history, conv_after + history, k - 1, width, end - start)
            window = conv_after + history
            _convolve(u, spare[: end - start], width, k, conv_weight + here, conv_bias + here, window)
    elif phase == 1:
        first, last = first * SHARE, min(last * SHARE, r + 2 * n)
        product(first, last, rows, width, inner, wide, x_proj, 4 * width, chosen, across)
    elif phase == NORMS:
        for b in range(rows):
            row, epsilon = chosen + b * across, np.float32(eps)
            _normalise(row, r, dt_norm, epsilon, spare)
            _normalise(row + 4 * r, n, B_norm, epsilon, spare)
            _normalise(row + 4 * (r + n), n, C_norm, epsilon, spare)
    elif phase == 2:
        product(start, end, rows, r, chosen, across, dt_proj, 4 * r, step, 4 * width)
        size, here = end - start, 4 * start
        shift = floats(dt_bias + here, size)
        for b in range(rows):
            dt, own = floats(step + 4 * b * width + here, size), floats(chosen + b * across, r + 2 * n)
            u, z = floats(inner + b * wide + here, size), floats(inner + b * wide + 4 * width + here, size)
            for c in range(size):
                dt[c] = softplus(dt[c] + shift[c])
            state, rest = 4 * b * n * width + here, (own[r : r + n], own[r + n :])
            _bring(ssm_before + state, ssm_after + state, n, width, size)
            _scan(u, dt, spare[:size], rest[0], rest[1], width, decay + here, D + here, ssm_after + state)
            for c in range(size):
                u[c] = gated(u[c], z[c])
    else:
        first, last = first * SHARE, min(last * SHARE, d)
        product(first, last, rows, width, inner, wide, out_proj, 4 * width, made if adds else y, 4 * d)
        if adds:
            for b in range(rows):
                source, target = floats(made + 4 * b * d, d), floats(y + 4 * b * d, d)
                for c in range(first, last):
                    target[c] += source[c]


@exact_kernel
def _alone(
    first: int,
    last: int,
    rows: int,
    d: int,
    width: int,
    n: int,
    k: int,
    r: int,
    adds: bool,
    eps: float,
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
    dt_norm: int,
    B_norm: int,
    C_norm: int,
    conv_before: int,
    conv_after: int,
    ssm_before: int,
    ssm_after: int,
    work: int,
    y: int,
) -> None:
    """All phases one after the other: for one row calls would take as long as the arithmetic."""
    for phase in (0, 1, NORMS, 2, 3):
        if phase != NORMS or eps >= 0:
            _step(
                0, width + d, phase, rows, d, width, n, k, r, adds, eps, x, in_proj, conv_weight, conv_bias, x_proj,
                dt_proj, dt_bias, decay, D, out_proj, dt_norm, B_norm, C_norm, conv_before, conv_after, ssm_before,
                ssm_after, work, y,
            )  # fmt: skip
