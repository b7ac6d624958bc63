"""One position of a whole Mamba layer on the CPU, for any number of rows, with the bits of the ops one by one.

The weights stream past once, whatever the number of rows; all else lies side by side by channel: states, decays and the
convolution's taps. What takes several threads is cut by channels, in four phases.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import expect
from ..kit.cpu import LOG2E, TILE, by_channel, located, new, paired, run
from ..kit.cpu.packed import room_of
from ..kit.cpu.product import MULTIPLICATIONS, Entries, entries
from ..kit.cpu.run import WORTH_THREADS
from ..kit.op import traced
from ..kit.packed import Weight, unpacked
from . import reference
from .cpu_kernels import CHOOSE, CONVOLVE, NORMS, OUT, PHASES, SCAN, SHARE, Parts, alike, needed, normalise, parts, step

Sizes = tuple[int, int, int, int, int, int]
"""rows, d, width, n, k, r"""


def fits(x: Tensor) -> bool:
    """See `moemamba.ops.fuses_mamba_step`."""
    return x.dtype == torch.float32 and not (torch.is_grad_enabled() or traced(x))


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
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`; with a norm, and in place where states do not lie by channel, the reference's."""
    weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, inner)
    done = None
    if norm_weight is None and not traced(x, *weights, *(inner or ())) and not torch.is_autocast_enabled("cpu"):
        done = _fused(x, conv_state, ssm_state, in_place, *weights)
    if done is None:
        first, middle, last = (unpacked(weight, x.dtype) for weight in (in_proj, x_proj, out_proj))
        dense = (first, conv_weight, conv_bias, middle, dt_proj, dt_bias, A_log, D, last, inner)
        return reference.mamba_step(
            x, conv_state, ssm_state, *dense, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, in_place=in_place
        )
    return done


def _fused(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_place: bool,
    in_proj: Weight,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Weight,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Weight,
    inner: reference.Inner | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the kernel; None where it cannot read what it is given."""
    (batch, _, d), (width, n), k, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    x, before = x.contiguous(), (by_channel(conv_state), by_channel(ssm_state))
    after = before if in_place else (new(*before[0].shape), new(*before[1].shape))
    if in_place and (before[0].data_ptr(), before[1].data_ptr()) != (conv_state.data_ptr(), ssm_state.data_ptr()):
        return None  # it is a copy that would be written to
    taps, decay = by_taps(conv_weight), decays(A_log)
    sizes, y = (batch, d, width, n, k, r), new(*x.shape)
    weights = _read(in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj, inner)
    work = new(space(sizes, in_proj, x_proj, out_proj))
    places = located(x, *weights, before[0], after[0], before[1], after[1], work, y)
    if places is None:
        return None
    launch(sizes, False, -1.0 if inner is None else inner.eps, *places)
    return y, after[0].transpose(1, 2), after[1].transpose(1, 2)


def _read(in_proj: Weight, taps: Tensor, conv_bias: Tensor, x_proj: Weight, *others: Any) -> tuple[Weight | None, ...]:
    """Weights in the order of the kernel, of which some may have 8 bits; the norms' are those of dt, B and C."""
    *inside, out_proj, inner = others
    norms = (None, None, None) if inner is None else inner[:3]
    return (*paired(in_proj), taps, conv_bias, *paired(x_proj), *inside, *paired(out_proj), *norms)


def by_taps(conv_weight: Tensor) -> Tensor:
    """(k, i) of the convolution's weight (i, k)."""
    return conv_weight.t().contiguous()


def decays(A_log: Tensor) -> Tensor:
    """(n, i) of A_log (i, n): what the scan makes of it, so that a state decays by 2^(dt decay)."""
    return (-torch.exp(A_log)).t().contiguous().mul_(float(LOG2E))


def space(sizes: Sizes, *projections: Weight) -> int:
    """Numbers that a step keeps on the way."""
    rows, d, width, n, _, r = sizes
    return rows * (3 * width + r + 2 * n + d + room_of(max(d, width), *projections)) + width + 2


@cache
def _plan(norms: bool, *of_8_bits: bool) -> tuple[Entries, Parts, int]:
    """What a layer's step calls, and its phases; it is asked for with every token."""
    return entries(any(of_8_bits)), parts(norms), needed(norms, *of_8_bits)


def launch(sizes: Sizes, adds: bool, eps: float, *places: int) -> None:
    """A step over as many threads as it is worth. See `cpu_kernels.step` for what lies where."""
    rows, d, width, n, _, r = sizes
    # Of projections in float32 the scale is 0.
    at, within, phases = _plan(eps >= 0, places[2] != 0, places[6] != 0, places[12] != 0)
    whole = rows * width * (3 * d + 2 * r + 2 * n) // MULTIPLICATIONS + rows * width * n
    if whole < WORTH_THREADS or torch.get_num_threads() == 1:
        step(0, width + d + rows, at, within, phases, *sizes, adds, eps, *places)
        return
    costs = {CONVOLVE: 2 * d, CHOOSE: r + 2 * n, SCAN: r + MULTIPLICATIONS * n, OUT: d}
    tiles = -(-width // TILE)
    shares = {CONVOLVE: tiles, CHOOSE: -(-(r + 2 * n) // SHARE), NORMS: 1, SCAN: tiles, OUT: -(-d // SHARE)}
    for phase in range(PHASES):
        if phases >> phase & 1:
            tasks, cost = shares.get(phase, rows), costs.get(phase, 1)
            work = rows * width * cost // MULTIPLICATIONS
            run(step, tasks, work, at, within, 1 << phase, *sizes, adds, eps, *places)


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
    work = new(space((rows, d, width, n, k, r), in_proj, x_proj, out_proj))
    read = (x, *_read(in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj, inner))
    eps = -1.0 if inner is None else inner.eps
    tensors = (*read, before[0], before[0], before[1], before[1], work, y)
    places = located(*tensors)
    if places is None:
        return None
    made = [conv_weight._version, A_log._version]

    def take(live: int) -> None:
        assert tensors  # and so are not freed
        if made != [conv_weight._version, A_log._version]:
            made[:] = conv_weight._version, A_log._version
            taps.copy_(by_taps(conv_weight))
            decay.copy_(decays(A_log))
        launch((live, d, width, n, k, r), True, eps, *places)

    return take


def step_of(
    weights: tuple[Any, ...], window: int, norm: tuple[Tensor, float] | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """See `moemamba.ops.mamba_step_of`."""
    in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, inner = weights
    (width, n), d, r, eps = A_log.shape, in_proj.shape[1], dt_proj.shape[1], -1.0 if inner is None else inner.eps

    def derived() -> tuple[Tensor, ...]:
        """Copies of two weights, to see when they change, and what is made of them."""
        taps, rates = conv_weight.detach().clone(), A_log.detach().clone()
        return taps, rates, by_taps(F.pad(taps, (window + 1 - taps.shape[1], 0))), decays(rates)

    def places_of(taps: Tensor, decay: Tensor) -> list[int] | None:
        read = _read(in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, decay, D, out_proj, inner)
        return located(*read, norm and norm[0])

    made = derived()
    places, now = places_of(*made[2:]), located(conv_weight, A_log)
    if places is None or now is None:
        return None
    # Changed as one, since several threads may be here.
    held: list[tuple[Any, Any, Any]] = [(made, places, located(*made[:2]))]
    counts = conv_weight.numel(), A_log.numel()

    def take(x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor | None:
        batch = x.shape[0]
        expect("x", x, (batch, 1, d))
        expect("conv_state", conv_state, (batch, window, width))
        expect("ssm_state", ssm_state, (batch, n, width))
        made, places, then = held[0]
        # By value, since writing to `.data` leaves versions as they are.
        if not alike(now[0], then[0], counts[0], now[1], then[1], counts[1]):
            made = derived()
            places, then = places_of(*made[2:]), located(*made[:2])
            held[0] = made, places, then
        sizes = (batch, d, width, n, window + 1, r)
        y = torch.empty_like(x) if norm is None else x.clone()
        size = space(sizes, in_proj, x_proj, out_proj)
        work = new(size + batch * d)
        found = located(x, conv_state, ssm_state, work, y)
        if found is None:
            return None
        source, conv, ssm, spare, target = found
        *read, weight = places
        if norm is not None:
            normed = spare + 4 * size
            normalise(parts(True), batch, d, norm[1], source, weight, spare, normed)
            source = normed
        launch(sizes, norm is not None, eps, source, *read, conv, conv, ssm, ssm, spare, target)
        return y

    return take
