"""The kernel of `cpu.py`: one position of a Mamba layer for any number of rows, in four phases, or eight."""

from typing import Any

import numpy as np

from ..kit.cpu import TILE, exact, exact_kernel, floats, fma, gated, next_state, shorts, silu, softplus
from ..kit.cpu.lanes import tile
from ..kit.cpu.product import Entries, multiply, rounded

SHARE = 16  # rows of a projection that are a task
# Phases; most layers have no norms, and only weights of 8 bits read what is rounded.
ROUND_X, CONVOLVE, ROUND_INNER, CHOOSE, NORMS, SCAN, ROUND_SCANNED, OUT, PHASES = range(9)

_ONE = np.float32(1)
_dot = tile(1, 1)

# Loops are over vectors that each function makes of an address, and change them in place: of slices of matrices LLVM
# would not know the strides, and what two arrays may share it does not vectorise.


@exact
def _normalise(x: int, size: int, weight: int, eps: Any, total: Any) -> None:
    """As `ops.rms_norm` does, in place; without weights they are ones."""
    _dot(size, x, 0, x, 0, total.ctypes.data, 0)
    scale = _ONE / np.sqrt(total[0] / np.float32(size) + eps)
    own = floats(x, size)
    for c in range(size):
        own[c] = own[c] * scale
    if weight:
        shares = floats(weight, size)
        for c in range(size):
            own[c] = own[c] * shares[c]


@exact_kernel
def normalise(rows: int, d: int, eps: float, x: int, weight: int, y: int) -> None:
    """y (rows, d), the norm of x with its weight (d,), as `ops.rms_norm` has it."""
    total = np.empty(1, np.float32)
    for b in range(rows):
        source, target = floats(x + 4 * b * d, d), floats(y + 4 * b * d, d)
        for c in range(d):
            target[c] = source[c]
        _normalise(y + 4 * b * d, d, weight, np.float32(eps), total)


@exact_kernel
def alike(first: int, of_first: int, size: int, second: int, of_second: int, length: int) -> bool:
    """Whether two vectors (size,) have the same bits, and two others (length,)."""
    a, b, c, d = (
        shorts(first, 2 * size),
        shorts(of_first, 2 * size),
        shorts(second, 2 * length),
        shorts(of_second, 2 * length),
    )
    differ = np.int16(0)
    for i in range(2 * size):
        differ |= a[i] ^ b[i]
    for i in range(2 * length):
        differ |= c[i] ^ d[i]
    return differ == 0


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


@exact
def needed(phase: int, eps: float, in_scale: int, x_scale: int, out_scale: int) -> bool:
    """Whether a layer with such norms and projections has a phase."""
    if phase == ROUND_X:
        return in_scale != 0
    if phase in (ROUND_INNER, ROUND_SCANNED):
        return x_scale != 0 or out_scale != 0
    return phase != NORMS or eps >= 0


@exact_kernel
def step(
    first: int,
    last: int,
    at: Entries,
    begin_phase: int,
    end_phase: int,
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
    in_scale: int,
    conv_weight: int,
    conv_bias: int,
    x_proj: int,
    x_scale: int,
    dt_proj: int,
    dt_bias: int,
    decay: int,
    D: int,
    out_proj: int,
    out_scale: int,
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
    """A share of a phase, or all of some, since calls take as long as the arithmetic of one row: into the convolution;
    what dt, B and C are chosen from; the scan; out, added to y or not. Where `eps` is not negative, all of the phase
    NORMS comes before the scan; where a projection is of 8 bits, and so has a scale, a phase that rounds what it reads,
    whose shares are rows.

    States are (b, k - 1, i) and (b, n, i), those after may be those before; `conv_weight` is (k, i), `decay` (n, i).
    """
    inner = work  # (rows, 2 width): u, and the gate
    step = inner + 8 * rows * width  # (rows, width) dt
    chosen = step + 4 * rows * width  # (rows, r + 2 n)
    made = chosen + 4 * rows * (r + 2 * n)  # (rows, d)
    levels = made + 4 * rows * d  # rows that are rounded
    across, wide, start, end = 4 * (r + 2 * n), 8 * width, first * TILE, min(last * TILE, width)
    spare = np.empty(width, np.float32)
    at_spare = spare.ctypes.data
    for phase in range(begin_phase, end_phase):
        if not needed(phase, eps, in_scale, x_scale, out_scale):
            continue
        if phase == CONVOLVE:
            multiply(at, start, end, 0, rows, rows, d, x, 4 * d, in_proj, in_scale, levels, inner, wide)
            multiply(at, width + start, width + end, 0, rows, rows, d, x, 4 * d, in_proj, in_scale, levels, inner, wide)
            here = 4 * start
            for b in range(rows):
                history = 4 * b * (k - 1) * width + here
                u = floats(inner + b * wide + here, end - start)
                _bring(conv_before + history, conv_after + history, k - 1, width, end - start)
                window = conv_after + history
                _convolve(u, floats(at_spare, end - start), width, k, conv_weight + here, conv_bias + here, window)
        elif phase == CHOOSE:
            low, high = first * SHARE, min(last * SHARE, r + 2 * n)
            multiply(at, low, high, 0, rows, rows, width, inner, wide, x_proj, x_scale, levels, chosen, across)
        elif phase == ROUND_X:
            rounded(at, first, min(last, rows), rows, d, x, 4 * d, levels)
        elif phase in (ROUND_INNER, ROUND_SCANNED):
            rounded(at, first, min(last, rows), rows, width, inner, wide, levels)
        elif phase == NORMS:
            for b in range(rows):
                row, epsilon = chosen + b * across, np.float32(eps)
                _normalise(row, r, dt_norm, epsilon, spare)
                _normalise(row + 4 * r, n, B_norm, epsilon, spare)
                _normalise(row + 4 * (r + n), n, C_norm, epsilon, spare)
        elif phase == SCAN:
            multiply(at, start, end, 0, rows, rows, r, chosen, across, dt_proj, 0, 0, step, 4 * width)
            size, here = end - start, 4 * start
            shift = floats(dt_bias + here, size)
            for b in range(rows):
                dt, shares = floats(step + 4 * b * width + here, size), chosen + b * across + 4 * r
                u, z = floats(inner + b * wide + here, size), floats(inner + b * wide + 4 * width + here, size)
                for c in range(size):
                    dt[c] = softplus(dt[c] + shift[c])
                state = 4 * b * n * width + here
                _bring(ssm_before + state, ssm_after + state, n, width, size)
                _scan(
                    u,
                    dt,
                    floats(at_spare, size),
                    floats(shares, n),
                    floats(shares + 4 * n, n),
                    width,
                    decay + here,
                    D + here,
                    ssm_after + state,
                )
                for c in range(size):
                    u[c] = gated(u[c], z[c])
        else:
            low, high = first * SHARE, min(last * SHARE, d)
            place = made if adds else y
            multiply(at, low, high, 0, rows, rows, width, inner, wide, out_proj, out_scale, levels, place, 4 * d)
            if adds:
                for b in range(rows):
                    place = 4 * (b * d + low)
                    source, target = floats(made + place, high - low), floats(y + place, high - low)
                    for c in range(high - low):
                        target[c] += source[c]
