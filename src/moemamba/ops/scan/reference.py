"""The selective scan in plain PyTorch: what it means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kit.recompute import recomputed
from ..packing import boundaries

SCAN_CHUNK = 32  # positions whose (b, chunk, i, n) tensors exist at once


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
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, length, width = u.shape
    if initial_state is None:
        state = torch.zeros(batch, width, A.shape[1], dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    valid, starts = None, None
    if seq_idx is not None:
        valid, starts = boundaries(seq_idx)
        u, dt, B, C = (t.masked_fill(~valid[..., None], 0) for t in (u, dt, B, C))
        z = None if z is None else z.masked_fill(~valid[..., None], 0)
    outputs = []
    for chunk in (slice(start, start + SCAN_CHUNK) for start in range(0, length, SCAN_CHUNK)):
        inputs = [None if t is None else t[:, chunk] for t in (u, dt, B, C, z, valid, starts)]
        args = (state, *inputs, A, D, dt_bias, dt_softplus, dtype)
        y, state = recomputed(_scan_chunk, *args)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(u), state


def _scan_chunk(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    valid: Tensor | None,
    starts: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t + D u_t (Mamba, arXiv 2312.00752, Algorithm 2)."""
    x, step = u.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    if valid is not None:  # a step of length zero changes nothing: decay 1, input 0
        step = step.masked_fill(~valid[..., None], 0)
    decay = torch.exp(step[..., None] * A.to(dtype))  # (b, c, i, n)
    drive = (step * x)[..., None] * B.to(dtype)[:, :, None, :]  # (b, c, i, n)
    states = []
    for t, (a, bx) in enumerate(zip(decay.unbind(1), drive.unbind(1), strict=True)):
        if starts is not None:  # filled, not multiplied by zero: what came before may be infinite
            state = state.masked_fill(starts[:, t, None, None], 0)
        state = torch.addcmul(bx, a, state)
        states.append(state)
    y = torch.einsum("bcin,bcn->bci", torch.stack(states, dim=1), C.to(dtype))
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0)
    return y.to(u.dtype), state
