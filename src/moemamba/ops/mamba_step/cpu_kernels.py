"""The kernel of `cpu.py`: one position of a Mamba layer for any number of rows, in four phases, or eight."""

from functools import cache

import numpy as np

from ..kit.cpu import TILE, apart, entry, exact_kernel, floats, fma, gated, next_state, shorts, silu, softplus
from ..kit.cpu.lanes import tile
from ..kit.cpu.product import Entries, multiply, rounded

SHARE = 16  # rows of a projection that are a task
# Phases; most layers have no norms, and only weights of 8 bits read what is rounded.
ROUND_X, CONVOLVE, ROUND_INNER, CHOOSE, NORMS, SCAN, ROUND_SCANNED, OUT, PHASES = range(9)

Parts = tuple[int, int, int]
"""see `parts`"""

_ONE = np.float32(1)
_dot = tile(1, 1)


def needed(norms: bool, of_in: bool, of_x: bool, of_out: bool) -> int:
    """The phases of a layer with norms or without, whose projections may be of 8 bits; a bit each."""
    always = 1 << CONVOLVE | 1 << CHOOSE | 1 << SCAN | 1 << OUT
    inside = 1 << ROUND_INNER | 1 << ROUND_SCANNED if of_x or of_out else 0
    return always | inside | of_in << ROUND_X | norms << NORMS


@cache
def parts(norms: bool) -> Parts:
    """For kernels, where the functions below are. That of norms is compiled only where there are some."""
    return entry(_convolve), entry(_scan), entry(_normalise) if norms else 0


# Loops are over vectors that each function makes of an address, and change them in place: of slices of matrices LLVM
# would not know the strides, and what two arrays may share it does not vectorise.


@apart(0)
def _convolve(u: int, total: int, size: int, width: int, k: int, taps: int, bias: int, before: int, after: int) -> None:
    """The convolution at one position with its activation, u in and out; the window moves on, to where it may be.

    Addresses of the first of `size` channels in rows of `width`; `total` is room for so many.
    """
    own, sums, shift = floats(u, size), floats(total, size), floats(bias, size)
    for c in range(size):
        sums[c] = shift[c]
    for tap in range(k - 1):
        weight, old = floats(taps + 4 * tap * width, size), floats(before + 4 * tap * width, size)
        for c in range(size):
            sums[c] = fma(weight[c], old[c], sums[c])
    for tap in range(k - 2):
        older, old = floats(after + 4 * tap * width, size), floats(before + 4 * (tap + 1) * width, size)
        for c in range(size):
            older[c] = old[c]
    if k > 1:
        last = floats(after + 4 * (k - 2) * width, size)
        for c in range(size):
            last[c] = own[c]
    weight = floats(taps + 4 * (k - 1) * width, size)
    for c in range(size):
        own[c] = silu(fma(weight[c], own[c], sums[c]))


@apart(1)
def _scan(
    u: int,
    z: int,
    step: int,
    drive: int,
    B: int,
    C: int,
    size: int,
    width: int,
    n: int,
    dt_bias: int,
    decay: int,
    D: int,
    before: int,
    after: int,
) -> None:
    """u becomes (C h + D u) silu(z), with h the state after this position, and `step` its softplus with the bias.

    Addresses of the first of `size` channels in rows of `width`; `drive` is room for so many.
    """
    own, gate, dt, driven = floats(u, size), floats(z, size), floats(step, size), floats(drive, size)
    shift, skip, Bs, Cs = floats(dt_bias, size), floats(D, size), floats(B, n), floats(C, n)
    for c in range(size):
        dt[c] = softplus(dt[c] + shift[c])
    for c in range(size):
        driven[c] = dt[c] * own[c]
    for c in range(size):
        own[c] = skip[c] * own[c]
    for s in range(n):
        place = 4 * s * width
        rate, h = floats(decay + place, size), floats(after + place, size)
        if before != after:
            old = floats(before + place, size)
            for c in range(size):
                h[c] = old[c]
        Bt, Ct = Bs[s], Cs[s]
        for c in range(size):
            h[c] = next_state(h[c], dt[c], rate[c], driven[c], Bt)
        for c in range(size):
            own[c] = fma(Ct, h[c], own[c])
    for c in range(size):
        own[c] = gated(own[c], gate[c])


@apart(2)
def _normalise(x: int, size: int, weight: int, eps: int) -> None:
    """As `ops.rms_norm` does, in place; without weights they are ones. At `eps` is this number and room for another."""
    _dot(size, x, 0, x, 0, eps + 4, 0)
    own, given = floats(x, size), floats(eps, 2)
    scale = _ONE / np.sqrt(given[1] / np.float32(size) + given[0])
    for c in range(size):
        own[c] = own[c] * scale
    if weight:
        shares = floats(weight, size)
        for c in range(size):
            own[c] = own[c] * shares[c]


@exact_kernel
def normalise(within: Parts, rows: int, d: int, eps: float, x: int, weight: int, spare: int, y: int) -> None:
    """y (rows, d), the norm of x with its weight (d,), as `ops.rms_norm` has it; `spare` is room for two numbers."""
    floats(spare, 1)[0] = np.float32(eps)
    source, target = floats(x, rows * d), floats(y, rows * d)
    for c in range(rows * d):
        target[c] = source[c]
    for b in range(rows):
        _normalise(within, y + 4 * b * d, d, weight, spare)


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


@exact_kernel
def step(
    first: int,
    last: int,
    at: Entries,
    within: Parts,
    phases: int,
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
    """A share of one of the `phases`, or all of several, since calls take as long as the arithmetic of one row: into
    the convolution; what dt, B and C are chosen from; the scan; out, added to y or not. Where there are norms, all of
    the phase NORMS comes before the scan; where a projection is of 8 bits, and so has a scale, a phase that rounds what
    it reads, whose shares are rows.

    States are (b, k - 1, i) and (b, n, i), those after may be those before; `conv_weight` is (k, i), `decay` (n, i).
    """
    inner = work  # (rows, 2 width): u, and the gate
    step = inner + 8 * rows * width  # (rows, width) dt
    chosen = step + 4 * rows * width  # (rows, r + 2 n)
    made = chosen + 4 * rows * (r + 2 * n)  # (rows, d)
    spare = made + 4 * rows * d  # (width,)
    levels = spare + 4 * (width + 2)  # rows that are rounded
    across, wide, start, end = 4 * (r + 2 * n), 8 * width, first * TILE, min(last * TILE, width)
    size, here = end - start, 4 * start
    for phase in range(PHASES):
        if not phases >> phase & 1:
            continue
        if phase == CONVOLVE:
            multiply(at, start, end, 0, rows, rows, d, x, 4 * d, in_proj, in_scale, levels, inner, wide)
            multiply(at, width + start, width + end, 0, rows, rows, d, x, 4 * d, in_proj, in_scale, levels, inner, wide)
            taps, bias = conv_weight + here, conv_bias + here
            for b in range(rows):
                window = 4 * b * (k - 1) * width + here
                before, after = conv_before + window, conv_after + window
                _convolve(within, inner + b * wide + here, spare + here, size, width, k, taps, bias, before, after)
        elif phase == CHOOSE:
            low, high = first * SHARE, min(last * SHARE, r + 2 * n)
            multiply(at, low, high, 0, rows, rows, width, inner, wide, x_proj, x_scale, levels, chosen, across)
        elif phase == ROUND_X:
            rounded(at, first, min(last, rows), rows, d, x, 4 * d, levels)
        elif phase in (ROUND_INNER, ROUND_SCANNED):
            rounded(at, first, min(last, rows), rows, width, inner, wide, levels)
        elif phase == NORMS:
            floats(spare, 1)[0] = np.float32(eps)
            for b in range(rows):
                row = chosen + b * across
                _normalise(within, row, r, dt_norm, spare)
                _normalise(within, row + 4 * r, n, B_norm, spare)
                _normalise(within, row + 4 * (r + n), n, C_norm, spare)
        elif phase == SCAN:
            multiply(at, start, end, 0, rows, rows, r, chosen, across, dt_proj, 0, 0, step, 4 * width)
            for b in range(rows):
                u, dt, B = inner + b * wide + here, step + 4 * b * width + here, chosen + b * across + 4 * r
                state = 4 * b * n * width + here
                _scan(
                    within,
                    u,
                    u + 4 * width,
                    dt,
                    spare + here,
                    B,
                    B + 4 * n,
                    size,
                    width,
                    n,
                    dt_bias + here,
                    decay + here,
                    D + here,
                    ssm_before + state,
                    ssm_after + state,
                )
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
