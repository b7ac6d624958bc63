"""Tensors for kernels, and what kernels read and write.

Tensors are handed over as addresses, so that each kernel is compiled exactly once, for every dtype, layout and absent
argument, and so that a call costs microseconds (it is made for every token). Kernels see nothing else: the functions up
to `located` make tensors for them and hand them over, as `run` does with room that they work in, whatever torch's
default dtype and device.
"""

from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from torch import Tensor
from torch.autograd import forward_ad

from ..packed import Packed, Weight
from .arithmetic import bits, from_bits
from .run import apart, entry, exact, kernel

TILE = 64  # channels that a task walks through time together: four AVX-512 registers, a few KB of state

Rows = tuple[int, int, int, int]
Streams = tuple[int, int, int, int]
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


def _array_of(number: Any) -> Any:
    """A function for kernels: the contiguous array of such numbers at an address, of one length or several.

    Made of instructions, since of numba's own each shape would be compiled as a function.
    """

    def describe(context: Any, address: Any, shape: Any) -> Any:
        several = isinstance(shape, types.BaseTuple)
        lengths = types.UniTuple(types.int64, len(shape)) if several else types.int64
        kind = types.Array(number, len(shape) if several else 1, "C")

        def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            address, shape = values
            made, sizes = (
                make_array(kind)(target, builder),
                cgutils.unpack_tuple(builder, shape) if several else [shape],
            )
            strides = [ir.IntType(64)(target.get_abi_sizeof(target.get_data_type(number)))]
            for size in reversed(sizes[1:]):
                strides.insert(0, builder.mul(strides[0], size))
            populate_array(made, builder.inttoptr(address, made.data.type), sizes, strides, strides[-1], None)
            return made._getvalue()

        return kind(types.int64, lengths), emit

    return intrinsic(describe)


floats = _array_of(types.float32)
shorts = _array_of(types.int16)
integers = _array_of(types.int64)
bytes_at = _array_of(types.uint8)  # of int8 too, where no number is negative
_halves = _array_of(types.uint16)


@apart(0)
def read(
    block: int,
    across: int,
    rows: int,
    place: int,
    batch: int,
    time: int,
    size: int,
    b: int,
    start: int,
    first: int,
    count: int,
) -> None:
    """block[j, :count] = tensor[b, start + j, first : first + count] as float32, for each of so many rows.

    The block has rows of `across` numbers, the tensor is one of `Rows`.
    """
    for j in range(rows):
        target, source = floats(block + 4 * across * j, count), place + b * batch + (start + j) * time + first * size
        if size == 4:
            numbers = floats(source, count)
            for c in range(count):
                target[c] = numbers[c]
        else:
            halves = _halves(source, count)
            for c in range(count):
                target[c] = from_bits(np.uint32(halves[c]) << np.uint32(16))


@apart(1)
def write(
    block: int,
    across: int,
    rows: int,
    place: int,
    batch: int,
    time: int,
    size: int,
    b: int,
    start: int,
    first: int,
    count: int,
) -> None:
    """The inverse of `read`, rounding to the nearest bfloat16, ties to even."""
    for j in range(rows):
        source, target = floats(block + 4 * across * j, count), place + b * batch + (start + j) * time + first * size
        if size == 4:
            numbers = floats(target, count)
            for c in range(count):
                numbers[c] = source[c]
        else:
            halves = _halves(target, count)
            for c in range(count):
                raw = bits(source[c])
                rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                halves[c] = np.uint16(rounded if source[c] == source[c] else np.uint32(0x7FC0))


@apart(2)
def load(tile: int, across: int, matrix: int, down: int, right: int, m: int, count: int) -> None:
    """tile (m, across) = the first `count` columns of a float32 matrix, and zeros; nothing but zeros if it is absent.

    Its entries lie `down` bytes below each other and `right` beside each other: a transpose has them exchanged.
    """
    for j in range(m):
        target, source = floats(tile + 4 * across * j, across), matrix + down * j
        for c in range(across):
            target[c] = _ZERO
        if matrix and right == 4:
            row = floats(source, count)
            for c in range(count):
                target[c] = row[c]
        elif matrix:
            for c in range(count):
                target[c] = floats(source + right * c, 1)[0]


@apart(3)
def store(tile: int, across: int, matrix: int, down: int, right: int, m: int, count: int) -> None:
    """The inverse of `load`."""
    for j in range(m):
        source, target = floats(tile + 4 * across * j, across), matrix + down * j
        if right == 4:
            row = floats(target, count)
            for c in range(count):
                row[c] = source[c]
        else:
            for c in range(count):
                floats(target + right * c, 1)[0] = source[c]


@cache
def streaming() -> Streams:
    """Where `read`, `write`, `load` and `store` are, for kernels that call them."""
    return entry(read), entry(write), entry(load), entry(store)


@exact
def clear(block: Any, first: int, last: int) -> None:
    """block[first:last] = 0, for which numba would compile what to say of shapes that do not fit, for seconds."""
    for j in range(first, last):
        for c in range(block.shape[1]):
            block[j, c] = _ZERO


@kernel
def _sum(first: int, last: int, count: int, size: int, parts: int, total: int) -> None:
    target = floats(total, (size,))
    for c in range(size):
        target[c] = _ZERO
    for part in range(count):
        source = floats(parts + 4 * size * part, (size,))
        for c in range(size):
            target[c] += source[c]
