"""The causal depthwise convolution on a GPU: SiLU, state and packed rows fused; a custom op with its gradient."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..kit.op import gradient, op, where_given
from ..packing import boundaries, position_marks, taps
from . import cuda as cuda_conv
from .triton_kernels import backward_kernel, forward_kernel, sum_kernel
from .triton_packed import packed_backward_kernel, packed_forward_kernel

# How kernels are launched: S runs of T positions by I channels a program, K positions' loads at a time.
FORWARD = {"S": 4, "T": 32, "K": 16, "I": 128, "num_warps": 4}
BACKWARD = {"S": 4, "T": 64, "K": 8, "I": 64, "num_warps": 4}
PACKED_FORWARD = {"T": 32, "I": 128, "num_warps": 4}
PACKED_BACKWARD = {"K": 4, "I": 128, "num_warps": 1}
SEGMENT = 128  # positions of a program in the backward pass of packed rows
SUM = {"R": 32, "I": 32, "num_warps": 4}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cuda: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.causal_conv1d`. With `cuda`, gradients are by the kernels of `cuda.py` where they hold."""
    marks = sources = resume = None
    if seq_idx is not None and seq_idx.shape[1]:
        marks, sources, resume = _packed(seq_idx, weight.shape[1])
    args = (x, weight, bias, initial_state, marks, sources, resume, activation == "silu", cuda)
    return _forward(*args)


def conv_with_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same on an NVIDIA GPU, where nobody asked for Triton alone."""
    return causal_conv1d(x, weight, bias, activation, initial_state, seq_idx, cuda=True)


def _packed(seq_idx: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What positions are (b, l), where their windows lie (b, l + 1, k), and where each segment's walk begins (b, s)."""
    length = seq_idx.shape[1]
    index, inside = taps(seq_idx, width)
    valid, _ = boundaries(seq_idx)
    time = torch.arange(length + 1, device=seq_idx.device)
    own = torch.where(torch.nn.functional.pad(valid, (0, 1)), time, -width)
    earlier = torch.where(inside, index - (width - 1), -width)
    sources = torch.cat([own[..., None], earlier], dim=-1).to(torch.int32)
    # A walk begins after the (k - 1)th token from the segment's end on: the first place that so many tokens precede.
    tokens = valid.cumsum(1)
    stops = torch.arange(SEGMENT, length + SEGMENT, SEGMENT, device=seq_idx.device).clamp(max=length)
    wanted = tokens[:, stops - 1] + width - 1
    resume = (torch.searchsorted(tokens, wanted) + 1).clamp(max=length).maximum(stops)
    return position_marks(seq_idx), sources.contiguous(), resume.to(torch.int32).contiguous()


def _like_outputs(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    return x.new_empty((batch, length, width)), x.new_empty((batch, width, weight.shape[1] - 1))


@op("causal_conv1d", fake=_like_outputs)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    sources: Tensor | None,
    resume: Tensor | None,
    silu: bool,
    cuda: bool,
) -> tuple[Tensor, Tensor]:
    """y (b, l, i) and final_state (b, i, k - 1)."""
    (batch, length, width), count = x.shape, weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    final_state = torch.empty((batch, width, count - 1), dtype=x.dtype, device=x.device)
    how = FORWARD if sources is None else PACKED_FORWARD
    tiles = triton.cdiv(width, how["I"])
    parts = batch * max(triton.cdiv(length, how["T"] * how.get("S", 1)), 1)
    if parts * tiles:
        args = (y, final_state, *x.stride()[:2], length, width)
        if sources is None:
            forward_kernel[(parts * tiles,)](
                x, weight.contiguous(), bias, history, *args, SILU=silu, TAPS=count, WIDE=_power(count), **how
            )
        else:
            packed_forward_kernel[(parts * tiles,)](
                x, weight.contiguous(), bias, history, sources, *args, SILU=silu, TAPS=count, **how
            )
    return y, final_state


@gradient(_forward, outputs="y, final_state", of="x, weight, bias, initial_state")
def _backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    sources: Tensor | None,
    resume: Tensor | None,
    silu: bool,
    cuda: bool,
) -> list[Tensor]:
    (batch, length, width), count = x.shape, weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    dy, weight = torch.zeros_like(x) if dy is None else dy, weight.contiguous()
    dy = dy.contiguous()
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    if cuda and sources is None and history is None and cuda_conv.holds(dy, x, weight):
        dx, dweight, dbias = cuda_conv.backward(dy, dfinal, x, weight, bias, silu)
        return where_given((x, weight, bias, None), dx, dweight, dbias, None)
    how = BACKWARD if sources is None else PACKED_BACKWARD
    tiles = triton.cdiv(width, how["I"])
    parts = batch * max(triton.cdiv(length, SEGMENT if sources is not None else how["S"] * how["T"]), 1)
    dx = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    dhistory = torch.empty((batch, width, count - 1), dtype=torch.float32, device=x.device)
    partial = torch.empty((parts, count + 1, width), dtype=torch.float32, device=x.device)
    if parts * tiles:
        inputs, strides = (dy, dfinal, x, weight, bias, history), (*x.stride()[:2], length, width)
        if sources is None:
            backward_kernel[(parts * tiles,)](
                *inputs, dx, partial, None if history is None else dhistory, *strides,
                SILU=silu, TAPS=count, WIDE=_power(count), **how,
            )  # fmt: skip
        else:
            packed_backward_kernel[(parts * tiles,)](
                *inputs, marks, sources, resume, dx, partial, dhistory, *strides, SEGMENT, SILU=silu, TAPS=count, **how
            )
    if width:
        programs = (count + 1) * triton.cdiv(width, SUM["I"])
        sum_kernel[(programs,)](partial, dweight, dbias, parts, width, TAPS=count, **SUM)
    dinitial = None if initial_state is None else dhistory.to(initial_state.dtype, copy=True)
    return where_given((x, weight, bias, initial_state), dx, dweight, dbias, dinitial)


def _power(count: int) -> int:
    return int(triton.next_power_of_2(count))
