"""Selective scan on the CPU: a task walks a tile of channels of one row through time, its states in the first cache.

The backward pass starts from states that the forward pass kept every `CHUNK` positions and recomputes those between.
dB and dC are summed over a tile's channels in the kernel and over tiles afterwards, in the tiles' order.
"""

import torch
from torch import Tensor

from ..kit.cpu import address, by_channel, cast, new, plain, readable, rows, run, streaming, summed
from ..kit.op import gradient, op, wants_grad, where_given
from ..packing import position_marks
from .cpu_kernels import CHUNK, kernels, lanes, space


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
    dtype = u.dtype
    u, dt, B, C, z = readable(u), readable(dt), readable(B), readable(C), readable(z)
    A, D, dt_bias, initial_state = plain(A), plain(D), plain(dt_bias), by_channel(initial_state)
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    marks = None if seq_idx is None else position_marks(seq_idx)
    y, final_state, _ = _forward(*tensors, dt_softplus, marks, wants_grad(*tensors))
    return cast(y, dtype), final_state.transpose(1, 2)


# --- what torch.compile and autograd see ---


def _outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = u.shape
    tile = lanes(width)
    kept = (batch, -(-width // tile), -(-length // CHUNK), A.shape[1], tile) if keep else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, A.shape[1], width), dtype=torch.float32),
        u.new_empty(kept, dtype=torch.float32),
    )


@op("cpu_selective_scan", fake=lambda u, dt, A, *rest: _outputs(u, A, rest[-1]))
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
    dt_softplus: bool,
    marks: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state (b, n, i), and the states that the backward pass starts from (empty unless `keep`)."""
    y, final_state, kept = _outputs(u, A, keep)
    tile = lanes(u.shape[2])
    (batch, length, width), n = u.shape, A.shape[1]
    shape, tiles = (*u.shape, n), -(-width // tile)
    B_rows, C_rows = rows(B, batch, length, n), rows(C, batch, length, n)
    streams = (rows(u, *u.shape), rows(dt, *u.shape), B_rows, C_rows, rows(z, *u.shape), rows(y, *u.shape))
    parameters = (address(A, width, n), address(D, width), address(dt_bias, width), dt_softplus)
    states = (address(initial_state, batch, n, width), address(final_state, batch, n, width))
    tasks, work = batch * tiles, u.numel() * n
    rest = (address(marks, batch, length, dtype=torch.int8), address(kept, *kept.shape) if keep else 0)
    room = space(tile, length, n, backward=False)
    run(kernels(tile).scan, tasks, work, streaming(), shape, *streams, *parameters, *states, *rest, space=room)
    return y, final_state, kept


@gradient(_forward, outputs="y, final_state, kept", of="u, dt, A, B, C, D, z, dt_bias, initial_state")
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
    dt_softplus: bool,
    marks: Tensor | None,
    kept: Tensor,
) -> list[Tensor]:
    dy = torch.zeros_like(u) if dy is None else readable(dy)
    dfinal_state = plain(dfinal_state)
    (batch, length, width), n, tiles = u.shape, A.shape[1], kept.shape[1]
    du, ddt = new(*u.shape, dtype=u.dtype), new(*u.shape, dtype=dt.dtype)
    dz = None if z is None else new(*u.shape, dtype=z.dtype)
    dA, dstate = new(batch, width, n), new(batch, n, width)
    dB, dC = new(tiles, batch, length, n), new(tiles, batch, length, n)
    dD, dbias = new(batch, width), new(batch, width)
    run(
        kernels(kept.shape[-1]).backward,
        batch * tiles,
        u.numel() * n,
        streaming(),
        (batch, length, width, n),
        *[rows(t, *u.shape) for t in (u, dt)],
        *[rows(t, batch, length, n) for t in (B, C)],
        rows(z, *u.shape),
        address(A, width, n),
        *[address(t, width) for t in (D, dt_bias)],
        dt_softplus,
        address(marks, batch, length, dtype=torch.int8),
        address(kept, *kept.shape),
        rows(dy, *u.shape),
        address(dfinal_state, batch, n, width),
        *[rows(t, *u.shape) for t in (du, ddt, dz)],
        address(dA, batch, width, n),
        *[address(t, tiles, batch, length, n) for t in (dB, dC)],
        *[address(t, batch, width) for t in (dD, dbias)],
        address(dstate, batch, n, width),
        space=space(kept.shape[-1], length, n, backward=True),
    )
    sums = (summed(dA), summed(dB).to(B.dtype), summed(dC).to(C.dtype), summed(dD))
    return where_given((u, dt, A, B, C, D, z, dt_bias, initial_state), du, ddt, *sums, dz, summed(dbias), dstate)
