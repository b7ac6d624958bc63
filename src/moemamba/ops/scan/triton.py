"""The selective scan on a GPU: which kernels of `triton_kernels.py` run, and how; a custom op with its gradient.

Where batch and channels fill the GPU, one program walks a tile of channels through all of time. Elsewhere time is cut
into chunks that run side by side, after a pass that finds the state each begins with: decays are then computed twice,
which pays where most of the GPU would idle. Nothing is summed by atomics: results repeat bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..arguments import dense_rows, gradients_like
from ..kit.op import gradient, op
from ..packing import position_marks
from .triton_backward import backward_kernel, summarise_backward_kernel
from .triton_kernels import GROUP, WIDEST, carry_kernel, forward_kernel, summarise_forward_kernel

# Without a hidden stride a state tile is laid out along d_state, as it is in memory: right for reading one, once.
step_kernel = triton.jit(forward_kernel.fn)

# How each kernel is launched: K positions a group.
LAUNCH: dict[str, dict[str, int]] = {
    "step": {"K": 1, "num_warps": 1},
    "forward": {"K": 2, "num_warps": 1, "maxnreg": 168},
    "summarise": {"K": 2, "num_warps": 1},
    "carry": {"K": 8, "BLOCK": 128, "num_warps": 4},
    "backward": {"K": 4, "T": 8, "num_warps": 1, "num_stages": 1},
}
PROGRAMS = 2000  # programs of one warp each that fill the GPU
CHUNK = 256  # positions between saved states


class Plan(NamedTuple):
    """How a scan of some shape runs."""

    states: int  # N, d_state rounded up to a power of two
    block: int  # M, states of a channel that the backward pass holds at a time
    forward_tile: int  # channels of a program
    backward_tile: int
    chunk: int  # positions between saved states
    chunked: bool  # one program a chunk, rather than one for all of them


def plan(batch: int, length: int, width: int, n_state: int) -> Plan:
    """The configuration for a shape: an explicit rule, so that nothing is searched for at the first call."""
    states = max(8, triton.next_power_of_2(n_state))
    forward_tile = min(WIDEST.value, max(GROUP.value, 1024 // states))
    backward_tile = max(GROUP.value, forward_tile // 2)
    programs = batch * triton.cdiv(width, forward_tile)
    chunk = CHUNK
    while chunk > 64 and programs * triton.cdiv(length, chunk) < PROGRAMS:
        chunk //= 2
    chunked = length > chunk and programs < PROGRAMS // 2
    return Plan(
        states,
        max(4, states // 4),
        forward_tile,
        backward_tile,
        chunk if chunked else max(1, min(length, CHUNK)),
        chunked,
    )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.selective_scan`."""
    marks = None if seq_idx is None else position_marks(seq_idx)
    args = (u, dt, A, B, C, D, z, dt_bias, initial_state, marks, dt_softplus)
    y, final_state, _ = _forward(*args, torch.is_grad_enabled())
    return y, final_state


def _like_outputs(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, width), n_state = u.shape, A.shape[1]
    how = plan(batch, length, width, n_state)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final_state = torch.empty((batch, width, n_state), dtype=torch.float32, device=u.device)
    return y, final_state, _saved_states(u, how, n_state, rest[-1] or how.chunked)


@op("selective_scan", fake=_like_outputs)
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    dt_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, i), final_state (b, i, n), and if `save` the state at the beginning of every chunk."""
    (batch, length, width), n_state = u.shape, A.shape[1]
    how = plan(batch, length, width, n_state)
    u, dt, A = dense_rows(u), dense_rows(dt), A.float().contiguous()
    z = None if z is None else dense_rows(z)
    initial_state = None if initial_state is None else initial_state.contiguous()
    if length > 1:  # read by every tile of channels: converted once, not each time
        B, C = B.float(), C.float()
    B, C = dense_rows(B), dense_rows(C)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final_state = torch.empty((batch, width, n_state), dtype=torch.float32, device=u.device)
    starts = _saved_states(u, how, n_state, save or how.chunked)
    strides = (*u.stride()[:2], *dt.stride()[:2], *B.stride()[:2])
    sizes = (length, width, n_state, how.chunk, 1)
    tiles = batch * triton.cdiv(width, how.forward_tile)
    if how.chunked:
        chunks = triton.cdiv(length, how.chunk)
        totals = torch.empty((batch, chunks, width), dtype=torch.float32, device=u.device)
        summarise_forward_kernel[(tiles * chunks,)](
            u, dt, A, B, dt_bias, marks, starts, totals, *strides, *sizes,
            SOFTPLUS=dt_softplus, I=how.forward_tile, N=how.states, **LAUNCH["summarise"],
        )  # fmt: skip
        _carry(A, starts, totals, initial_state, final_state, how, reverse=False)
        tiles *= chunks
    if tiles:
        kernel = forward_kernel if length > 1 else step_kernel
        kernel[(tiles,)](
            u, dt, A, B, C, D, z, dt_bias, marks, initial_state, starts, y, final_state,
            *strides, *C.stride()[:2], *_strides(z), *sizes,
            CHUNKED=how.chunked, SAVE=save and not how.chunked, SOFTPLUS=dt_softplus,
            I=how.forward_tile, N=how.states, **LAUNCH["forward" if length > 1 else "step"],
        )  # fmt: skip
    return y, final_state, starts


@gradient(_forward, outputs="y, final_state, starts", of="u, dt, A, B, C, D, z, dt_bias, initial_state")
def _backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    dt_softplus: bool,
    starts: Tensor,
) -> list[Tensor]:
    dy = torch.zeros_like(u) if dy is None else dy
    (batch, length, width), n_state = u.shape, A.shape[1]
    how = plan(batch, length, width, n_state)
    grads = gradients_like(u, dt, A, B, C, D, z, dt_bias, initial_state)
    dinitial = torch.empty((batch, width, n_state), dtype=torch.float32, device=u.device)
    dy, u, dt, natural = dy.contiguous(), dense_rows(u), dense_rows(dt), A.float().contiguous()
    z = None if z is None else dense_rows(z)
    B, C = dense_rows(B.float()), dense_rows(C.float())
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    strides = (*dt.stride()[:2], *C.stride()[:2], *_strides(z))
    sizes = (length, width, n_state, how.chunk, 1)
    tiles, chunks = triton.cdiv(width, how.backward_tile), triton.cdiv(length, how.chunk)
    parts = batch * chunks if how.chunked else batch
    if how.chunked:
        adjoints = torch.empty_like(starts)
        totals = torch.empty((batch, chunks, width), dtype=torch.float32, device=u.device)
        forward_tiles = batch * chunks * triton.cdiv(width, how.forward_tile)
        summarise_backward_kernel[(forward_tiles,)](
            dy, dt, natural, C, z, dt_bias, marks, adjoints, totals, *strides, *sizes,
            SOFTPLUS=dt_softplus, I=how.forward_tile, N=how.states, **LAUNCH["summarise"],
        )  # fmt: skip
        _carry(natural, adjoints, totals, dfinal, dinitial, how, reverse=True)
        dfinal = adjoints
    new = u.new_empty
    padded = triton.cdiv(width, WIDEST.value) * WIDEST.value
    scratch = new(
        (parts * tiles, triton.cdiv(how.chunk, LAUNCH["backward"]["K"]), how.states, how.backward_tile),
        dtype=torch.float32,
    )
    dA = new((parts, padded // GROUP.value, how.states, GROUP.value), dtype=torch.float32)
    dBC = new((2, tiles, batch, length, n_state), dtype=torch.float32)
    dD, dbias = new((2, parts, width), dtype=torch.float32)
    precision = "tf32x3" if u.dtype == torch.float32 else "tf32"  # of the products that sum dB and dC over channels
    if parts * tiles:
        backward_kernel[(parts * tiles,)](
            dy, u, dt, natural, B, C, D, z, dt_bias, marks, starts, dfinal, scratch,
            grads[0], grads[1], grads[6], dA, dBC, dD, dbias, dinitial,
            *u.stride()[:2], *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2], *_strides(z), batch, *sizes,
            CHUNKED=how.chunked, SOFTPLUS=dt_softplus,
            I=how.backward_tile, N=how.states, M=how.block, PRECISION=precision, **LAUNCH["backward"],
        )  # fmt: skip
    sums = {
        2: dA.sum(0).transpose(1, 2).reshape(padded, how.states)[:width, :n_state],
        3: dBC[0].sum(0),
        4: dBC[1].sum(0),
        5: dD.sum(0),
        7: dbias.sum(0),
        8: dinitial,
    }
    for index, value in sums.items():
        if grads[index].numel():
            grads[index] = value.to(grads[index].dtype).contiguous()
    return grads


def _carry(
    A: Tensor, sums: Tensor, totals: Tensor, first: Tensor | None, last: Tensor, how: Plan, reverse: bool
) -> None:
    """Turn what each chunk adds to a state into the state it meets, from `first` to `last`, along or against time."""
    batch, chunks = sums.shape[:2]
    grid = (batch * triton.cdiv(sums[0, 0].numel(), LAUNCH["carry"]["BLOCK"]),)
    carry_kernel[grid](
        A, sums, totals, first, last, chunks, *last.shape[1:],
        REVERSED=reverse, N=how.states, **LAUNCH["carry"],
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def _saved_states(u: Tensor, how: Plan, n_state: int, needed: bool) -> Tensor:
    """(b, chunks, blocks of channels, N, GROUP) float32, as `_saved` in the kernels addresses it."""
    batch, length, width = u.shape
    blocks = triton.cdiv(width, WIDEST.value) * (WIDEST.value // GROUP.value)
    chunks = triton.cdiv(length, how.chunk) if needed else 0
    return torch.empty((batch, chunks, blocks, how.states, GROUP.value), dtype=torch.float32, device=u.device)
