"""The convolution's gradients on an NVIDIA GPU: how the kernels of `cuda_conv.cu` are launched.

They hold for whole rows without a state in or a gradient of the state left behind, channels that can be loaded four
together, and up to four taps; the Triton kernels hold for every other convolution, and for its forward pass.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from .cuda_runtime import Module
from .cuda_scan import TYPES, _float, _processors

OWN = 4  # channels of a thread, loaded together
AHEAD = 4  # positions whose loads are under way
TALL = 4  # of a block's four warps, how many follow each other in time
RESIDENT = 4  # blocks of a multiprocessor
WAVES = 1  # how many times over the blocks fill the GPU
EARLY = True
LONGEST = 4  # taps that registers hold

# `struct Conv` of cuda_conv.cu.
ARGUMENTS = struct.Struct("=9q6i")


def holds(dy: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels can take such tensors, of which dy (b, l, i) is contiguous and x (b, l, i) is in its channels."""
    together = all(n % OWN == 0 for n in (x.shape[2], *x.stride()[:2]))
    aligned = all(t.data_ptr() % (OWN * t.element_size()) == 0 for t in (dy, x))
    return together and aligned and x.numel() > 0 and dy.dtype == x.dtype in TYPES and weight.shape[1] <= LONGEST


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (b, l, i), weight (i, k) and bias (i,), for whole rows, of tensors of which `holds` is true."""
    (batch, length, width), count = x.shape, weight.shape[1]
    dx = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    dweight = torch.empty((width, count), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty((width,), dtype=torch.float32, device=x.device)
    device = x.device.index or 0
    columns = -(-width // (32 * OWN * 4 // TALL))
    span, parts = _parts(batch * columns, length, _processors(device))
    blocks = -(-parts // TALL)
    partial = torch.empty((batch, blocks, count + 1, width), dtype=torch.float32, device=x.device)
    tensors = (dy, x, _float(weight), _float(bias), dx, partial, dweight, dbias)
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    size = x.element_size()
    arguments = ARGUMENTS.pack(
        *pointers, x.stride(0) * size, x.stride(1) * size, batch, length, width, span, parts
    )  # fmt: skip
    meeting = (TALL - 1) * (count + 1) * 32 * OWN * 4 // TALL * 4
    with torch.cuda.device(device):
        module = _module(device, TYPES[x.dtype], count, silu, OWN, AHEAD, TALL, RESIDENT)
        sums = (count + 1) * -(-width // 32)
        module.launch(
            [("backward", batch * columns * blocks, 128, meeting), ("finish", sums, 256, 1024)], arguments, EARLY
        )
    return dx, dweight.to(weight.dtype), None if bias is None or dbias is None else dbias.to(bias.dtype)


@functools.cache
def _parts(columns: int, length: int, processors: int) -> tuple[int, int]:
    """Positions of a run, and runs of a row, so that `columns` blocks a run fill the GPU WAVES times."""
    wanted = max(1, WAVES * processors * RESIDENT // columns) * TALL
    span = -(-length // wanted)
    span = -(-span // AHEAD) * AHEAD
    return span, -(-length // span)


@functools.cache
def _module(device: int, kind: int, taps: int, silu: bool, own: int, ahead: int, tall: int, resident: int) -> Module:
    files = ("cuda_elements.cu", "cuda_conv.cu")
    source = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in files)
    constants = {
        "TYPE": kind, "TAPS": taps, "SILU": silu, "OWN": own, "AHEAD": ahead, "TALL": tall, "RESIDENT": resident,
    }  # fmt: skip
    with torch.cuda.device(device):
        return Module(source, {name: int(value) for name, value in constants.items()}, device)
