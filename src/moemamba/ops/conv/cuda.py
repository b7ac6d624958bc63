"""The convolution's gradients on an NVIDIA GPU: how the kernels of `cuda.cu` are launched.

They hold for whole rows without a state before them, channels that can be loaded four together, and up to four taps;
the Triton kernels hold for every other convolution, and for its forward pass.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..kit.cuda import TYPES, Module, plain, processors, source

OWN = 4  # channels of a thread, loaded together
AHEAD = 4  # positions whose loads are under way
TALL = 4  # warps of a block, which follow each other in time
RESIDENT = 4  # blocks of a multiprocessor at a time
TAPS = 4  # at most, since they are in registers

# `struct Conv` of cuda.cu.
ARGUMENTS = struct.Struct("=9q6i")


def holds(dy: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels can take such tensors: dy (b, l, i) contiguous, x (b, l, i) with channels contiguous."""
    together = all(n % OWN == 0 for n in (x.shape[2], *x.stride()[:2]))
    aligned = all(t.data_ptr() % (OWN * t.element_size()) == 0 for t in (dy, x))
    return together and aligned and x.numel() > 0 and dy.dtype == x.dtype in TYPES and weight.shape[1] <= TAPS


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (b, l, i), weight (i, k) and bias (i,), for whole rows, of tensors of which `holds` is true.

    `dfinal` (b, i, k-1), of the state left behind, is there in every compiled layer: zero, if nobody wanted that state.
    """
    (batch, length, width), count, device = x.shape, weight.shape[1], x.device.index or 0
    dx = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    dweight = torch.empty((width, count), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty((width,), dtype=torch.float32, device=x.device)
    columns = -(-width // (32 * OWN))
    span, parts = _parts(batch * columns, length, processors(device))
    partial = torch.empty((batch, -(-parts // TALL), count + 1, width), dtype=torch.float32, device=x.device)
    tensors = (dy, x, plain(weight), plain(bias), dx, partial, dweight, dbias)
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    strides = [stride * x.element_size() for stride in x.stride()[:2]]
    arguments = ARGUMENTS.pack(*pointers, *strides, batch, length, width, span, parts)
    walking = ("backward", batch * columns * partial.shape[1], 32 * TALL, (TALL - 1) * (count + 1) * 32 * OWN * 4)
    with torch.cuda.device(device):
        module = _module(device, TYPES[x.dtype], count, silu)
        module.launch([walking, ("finish", (count + 1) * -(-width // 32), 256, 1024)], arguments, waiting=True)
    if dfinal is not None:
        left = min(length, count - 1)  # inputs that are part of it
        dx[:, length - left :] += dfinal[:, :, count - 1 - left :].mT
    return dx, dweight.to(weight.dtype), None if bias is None or dbias is None else dbias.to(bias.dtype)


@functools.cache
def _parts(tiles: int, length: int, processors: int) -> tuple[int, int]:
    """Positions of a run, and runs of a row, so that blocks of TALL runs of each of `tiles` just fill the GPU."""
    runs = max(1, processors * RESIDENT // tiles) * TALL
    span = -(-length // (runs * AHEAD)) * AHEAD
    return span, -(-length // span)


@functools.cache
def _module(device: int, kind: int, taps: int, silu: bool) -> Module:
    constants = {"TYPE": kind, "TAPS": taps, "SILU": int(silu)}
    constants |= {"OWN": OWN, "AHEAD": AHEAD, "TALL": TALL, "RESIDENT": RESIDENT}
    with torch.cuda.device(device):
        return Module(source(Path(__file__).with_name("cuda.cu")), constants, device)
