"""What Triton kernels of several families share."""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import packing

PLAIN = tl.constexpr(packing.PLAIN)


BEGIN = tl.constexpr(packing.BEGIN)


PADDING = tl.constexpr(packing.PADDING)


LOG2E = tl.constexpr(1.4426950408889634)


LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def wide_index(index):
    """An index as 64 bits, since offsets into large tensors do not fit 32."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); rsqrt is one instruction, a division eight."""
    root = tl.rsqrt(1.0 + tl.exp2(-LOG2E * x))
    return root * root


@triton.jit
def ready(PDL: tl.constexpr):
    """Wait for the kernel before; then the next may begin with what needs nothing of this one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def matrix(pointer, row, rows, column, columns):
    """A tile of a (rows, columns) matrix; zeros outside."""
    where = pointer + row[:, None].to(tl.int64) * columns + column[None, :]
    return tl.load(where, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def vector(pointer, place, size):
    return tl.load(pointer + place, mask=place < size, other=0.0).to(tl.float32)


PDL = os.environ.get("TRITON_INTERPRET") != "1"  # kernels overlap where the GPU can (Hopper and later)


def launch(warps: int, pdl: bool) -> dict[str, Any]:
    return {"num_warps": warps, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})


def overlap(x: Tensor) -> bool:
    """Whether kernels on this tensor's device may begin before the one before has ended."""
    return PDL and x.is_cuda and _capability(x.device) >= 9


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


class Tiles(NamedTuple):
    """How a product is cut into the work of programs."""

    rows: int
    columns: int
    depth: int
    stages: int  # tiles of the operands in flight
    warps: int
    programs: int = 1  # on a multiprocessor


def wide(width: int, x: Tensor) -> int:
    """Columns of a row that tensor descriptors accept: whole blocks of 16 bytes."""
    step = 16 // x.element_size()
    return (width + step - 1) // step * step


def aligned(x: Tensor) -> Tensor:
    """The same as tensor descriptors accept it: contiguous, from a whole block of 16 bytes on."""
    x = x.contiguous()
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))  # of one row it may be anything
    return x.clone(memory_format=torch.contiguous_format) if any(step % 16 for step in steps) else x


def blocks(tensor: Tensor, *shape: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(shape))


def programs(x: Tensor, tiles: Tiles) -> tuple[int]:
    """A persistent kernel's grid."""
    return (multiprocessors(x.device) * tiles.programs if x.is_cuda else 2,)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def halves(x):
    """Left and right half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
