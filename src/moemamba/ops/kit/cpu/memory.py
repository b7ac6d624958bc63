"""Tensors for kernels, and what kernels read and write.

Tensors are handed over as addresses, so that each kernel is compiled exactly once, for every dtype, layout and absent
argument, and so that a call costs microseconds (it is made for every token). Kernels see nothing else: the functions up
to `located` are the only ones that make tensors for them and hand them over, whatever torch's default dtype and device.
"""

from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]  # carray is public, but not in __all__
from torch import Tensor
from torch.autograd import forward_ad

from ..packed import Packed, Weight
from .arithmetic import FLOAT, bits, from_bits, instruction
from .run import apart, entry, exact, inner, kernel

TILE = 64  # channels that a task walks through time together: four AVX-512 registers, a few KB of state

Rows = tuple[int, int, int, int]
Streams = tuple[int, int]
"""see `streaming`"""
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

_ZERO = np.float32(0)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for a kernel to write to."""
    return torch.empty(shape, dtype=dtype, device=_HERE)


def address(tensor: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Where a contiguous tensor of this shape lies, for `floats`; an absent one has address 0.

    Raises:
        RuntimeError: it is not what the kernel reads.
    """
    if tensor is None:
        return 0
    if not (tensor.shape == shape and tensor.dtype is dtype and tensor.is_contiguous() and _is_here(tensor)):
        raise _mistaken(tensor, f"contiguous {dtype} of shape {shape}")
    return tensor.data_ptr()


def rows(tensor: Tensor | None, *shape: int) -> Rows:
    """A (b, l, channels) tensor for `read` and `write`: address, strides of b and l, size of an element (bytes).

    The channels must be contiguous (see `readable`); an absent tensor has address 0.

    Raises:
        RuntimeError: it is not what the kernel reads.
    """
    if tensor is None:
        return 0, 0, 0, 0
    batch, time, channels = tensor.stride()
    side_by_side = channels == 1 or tensor.is_contiguous()  # of one channel, or of none, the stride may be anything
    if not (tensor.shape == shape and tensor.dtype in _STREAMED and side_by_side and _is_here(tensor)):
        raise _mistaken(tensor, f"rows of float32 or bfloat16 of shape {shape}")
    size = tensor.element_size()
    return tensor.data_ptr(), batch * size, time * size, size


def located(*tensors: Weight | None) -> list[int] | None:
    """Where tensors lie whose shapes are known, for `floats`; None if one is not contiguous float32 here.

    Of weights of 8 bits there are two, of their bytes and their scale. Who knows them hands over `paired(weight)`.

    This is for the ops of generation, whose checks have to be short; what they cannot read goes another way.
    """
    places = []
    for tensor in tensors:
        if tensor is None:
            places.append(0)
        elif isinstance(tensor, Packed):
            values, scale = tensor
            below = located(scale) if values.dtype is torch.int8 and values.is_cpu and values.is_contiguous() else None
            if below is None:
                return None
            places += [values.data_ptr(), *below]
        elif (
            type(tensor) in _PLAIN
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.is_contiguous()
            and (forward_ad._current_level < 0 or _is_here(tensor))
        ):
            places.append(tensor.data_ptr())
        else:
            return None
    return places


def paired(weight: Weight) -> tuple[Weight | None, ...]:
    """For `located`, a weight that gets two places: the second is 0 where it is not of 8 bits."""
    return (weight,) if isinstance(weight, Packed) else (weight, None)


_HERE = torch.device("cpu")
_STREAMED = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_here(tensor: Tensor) -> bool:
    """Whether a tensor is in this memory and is all there is to it: no subclass, no forward-mode derivative."""
    if type(tensor) not in _PLAIN or not tensor.is_cpu:
        return False
    return forward_ad._current_level < 0 or forward_ad.unpack_dual(tensor).tangent is None


def _mistaken(tensor: Tensor, expected: str) -> RuntimeError:
    dual = (
        " with a forward-mode derivative" if type(tensor) in _PLAIN and tensor.is_cpu and not _is_here(tensor) else ""
    )
    return RuntimeError(
        f"a kernel for the CPU reads {expected}, and was given a {type(tensor).__name__}{dual} of {tensor.dtype} and "
        f'shape {tuple(tensor.shape)} on {tensor.device}; use ops.backend("reference")'
    )


def readable(tensor: MaybeTensor) -> MaybeTensor:
    """The same tensor with contiguous channels, in a dtype that `read` knows."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def plain(tensor: MaybeTensor) -> MaybeTensor:
    """The same tensor as contiguous float32, for `floats`."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor  # the calls below cost microseconds also where there is nothing to do
    return tensor.float().contiguous()


def by_channel(state: MaybeTensor) -> MaybeTensor:
    """(b, n, i) contiguous float32 of a state (b, i, n): kernels' states lie so in memory, channels innermost, and what
    they return is seen through a transposition, which costs nothing."""
    return None if state is None else plain(state.transpose(1, 2))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond also where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def summed(parts: Tensor) -> Tensor:
    """The sum of a contiguous float32 tensor over its first dimension, in order, whatever the number of threads."""
    total = new(*parts.shape[1:])
    _sum(0, 1, parts.shape[0], total.numel(), address(parts, *parts.shape), address(total, *total.shape))
    return total


# --- inside kernels ---

_float_pointer = instruction(types.int64, types.CPointer(types.float32), lambda b, x: b.inttoptr(x, FLOAT.as_pointer()))
_half_pointer = instruction(
    types.int64, types.CPointer(types.uint16), lambda b, x: b.inttoptr(x, ir.IntType(16).as_pointer())
)
_short_pointer = instruction(
    types.int64, types.CPointer(types.int16), lambda b, x: b.inttoptr(x, ir.IntType(16).as_pointer())
)
_integer_pointer = instruction(
    types.int64, types.CPointer(types.int64), lambda b, x: b.inttoptr(x, ir.IntType(64).as_pointer())
)
_byte_pointer = instruction(
    types.int64, types.CPointer(types.uint8), lambda b, x: b.inttoptr(x, ir.IntType(8).as_pointer())
)


@inner
def floats(address: int, shape: Any) -> Any:
    """A contiguous float32 array at an address."""
    return carray(_float_pointer(address), shape)


@inner
def shorts(address: int, shape: Any) -> Any:
    """A contiguous int16 array at an address."""
    return carray(_short_pointer(address), shape)


@inner
def integers(address: int, shape: Any) -> Any:
    """A contiguous int64 array at an address."""
    return carray(_integer_pointer(address), shape)


@inner
def bytes_at(address: int, shape: Any) -> Any:
    """A contiguous uint8 array at an address (of int8, where no number is negative)."""
    return carray(_byte_pointer(address), shape)


@apart
def _read(block: int, step: int, count: int, place: int, time: int, size: int, columns: int) -> None:
    for j in range(count):
        target = floats(block + j * step, columns)
        if size == 4:
            source = floats(place + j * time, columns)
            for c in range(columns):
                target[c] = source[c]
        else:
            halves = carray(_half_pointer(place + j * time), columns)
            for c in range(columns):
                target[c] = from_bits(np.uint32(halves[c]) << np.uint32(16))


@apart
def _write(block: int, step: int, count: int, place: int, time: int, size: int, columns: int) -> None:
    for j in range(count):
        source = floats(block + j * step, columns)
        if size == 4:
            target = floats(place + j * time, columns)
            for c in range(columns):
                target[c] = source[c]
        else:
            halves = carray(_half_pointer(place + j * time), columns)
            for c in range(columns):
                raw = bits(source[c])
                rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                halves[c] = np.uint16(rounded if source[c] == source[c] else np.uint32(0x7FC0))


@cache
def streaming() -> Streams:
    """What kernels hand on to `read` and `write`."""
    return entry(_read), entry(_write)


@inner
def read(
    at: Streams, block: Any, row: int, rows: int, tensor: Rows, b: int, start: int, first: int, count: int
) -> None:
    """block[row + j, :count] = tensor[b, start + j, first : first + count] as float32, for each of so many rows."""
    address, batch, time, size = tensor
    step = 4 * block.shape[1]
    place = address + b * batch + start * time + first * size
    _read(at[0], block.ctypes.data + row * step, step, rows, place, time, size, count)


@inner
def write(
    at: Streams, block: Any, row: int, rows: int, tensor: Rows, b: int, start: int, first: int, count: int
) -> None:
    """The inverse of `read`, rounding to the nearest bfloat16, ties to even."""
    address, batch, time, size = tensor
    step = 4 * block.shape[1]
    place = address + b * batch + start * time + first * size
    _write(at[1], block.ctypes.data + row * step, step, rows, place, time, size, count)


@exact
def clear(block: Any, first: int, last: int) -> None:
    """block[first:last] = 0, for which numba would compile what to say of shapes that do not fit, for seconds."""
    for j in range(first, last):
        for c in range(block.shape[1]):
            block[j, c] = _ZERO


@inner
def load_tile(tile: Any, matrix: int, width: int, first: int, count: int) -> None:
    """tile (m, TILE) = columns first .. first + count - 1 of a float32 (m, width) matrix; zero if absent."""
    clear(tile, 0, tile.shape[0])
    if matrix:
        m = tile.shape[0]
        source = floats(matrix, (m, width))
        for j in range(m):
            for c in range(count):
                tile[j, c] = source[j, first + c]


@inner
def store_tile(matrix: int, width: int, first: int, count: int, tile: Any) -> None:
    """The inverse of `load_tile`."""
    m = tile.shape[0]
    target = floats(matrix, (m, width))
    for j in range(m):
        for c in range(count):
            target[j, first + c] = tile[j, c]


@inner
def load_columns(tile: Any, matrix: int, first: int, count: int) -> None:
    """tile (m, TILE) = the transpose of rows first .. first + count - 1 of a float32 (?, m) matrix; zero if absent."""
    clear(tile, 0, tile.shape[0])
    if matrix:
        m = tile.shape[0]
        source = floats(matrix + 4 * m * first, (count, m))
        for j in range(m):
            for c in range(count):
                tile[j, c] = source[c, j]


@inner
def store_columns(matrix: int, first: int, count: int, tile: Any) -> None:
    """The inverse of `load_columns`."""
    m = tile.shape[0]
    target = floats(matrix + 4 * m * first, (count, m))
    for c in range(count):
        for j in range(m):
            target[c, j] = tile[j, c]


@kernel
def _sum(first: int, last: int, count: int, size: int, parts: int, total: int) -> None:
    target = floats(total, (size,))
    for c in range(size):
        target[c] = _ZERO
    for part in range(count):
        source = floats(parts + 4 * size * part, (size,))
        for c in range(size):
            target[c] += source[c]
