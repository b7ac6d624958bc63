"""What the CPU kernels share: compiling once, running over threads, and float32 arithmetic that LLVM vectorises.

A kernel is a numba function `kernel(first, last, *arguments)` that does the tasks first .. last - 1 of a list that the
work was cut into. The cut depends on the shapes alone and tasks share no output, so that results are bit for bit the
same for every number of threads. Tensors are handed over as addresses, so that each kernel is compiled exactly once,
for every dtype, layout and absent argument, and so that a call costs microseconds (it is made for every token).
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]  # carray is public, but not in __all__
from numba.core import event
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd import forward_ad

from ...host.files import cache_folder, expanded, keep_recent, used, writable
from ...host.terminal import say

TILE = 64  # channels that a task walks through time together: four AVX-512 registers, a few KB of state
KEPT = 4  # states of the sources whose compiled kernels are kept
WORTH_THREADS = 1 << 19  # inner iterations, some 100 µs; waking a thread takes tens

_config: Any = numba.config
Rows = tuple[int, int, int, int]
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

# `contract` lets multiplication and addition fuse; nothing that could change what infinities and NaN do.
FAST = {"contract", "nsz"}


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile at the first call, for this machine's vector units, and keep the result on disk if that can be."""
    folder = _cache_folder()
    before, _config.CACHE_DIR = _config.CACHE_DIR, folder
    try:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FAST | {"reassoc"}}
        compiled = numba.njit(cache=bool(folder), **options)(function)
    finally:
        _config.CACHE_DIR = before
    _kernels.add(function.__qualname__)
    return compiled  # type: ignore[no-any-return]


@cache
def _cache_folder() -> str:
    """Where compiled kernels are kept, or nothing if no place can be written to.

    A folder for each state of the sources, since numba takes a kernel's own file alone as a sign of change, and not
    those whose functions and constants are compiled into it.
    """
    here = Path(__file__).parent.parent
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.rglob("cpu*.py")))).hexdigest()[:16]
    # Not in the package's own folder, unless there is no other: what pip has not installed it does not remove.
    own = [Path(_config.CACHE_DIR)] if _config.CACHE_DIR else []
    others = [folder for folder in (cache_folder(), expanded("~/.cache/moemamba")) if folder and folder.is_absolute()]
    others.sort(key=lambda base: not (base / f"kernels-{sources}").is_dir())  # first where they are compiled already
    bases = [*own, *others, here / "__pycache__"]
    for base in bases:
        if writable(folder := base / f"kernels-{sources}"):
            used(folder)
            keep_recent(base, r"kernels-[0-9a-f]{16}", KEPT)
            return str(folder)
    return ""


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call. Without numba's check for division by zero, which would keep loops scalar."""
    return numba.njit(fastmath=FAST, error_model="numpy")(function)  # type: ignore[no-any-return]


def summing(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `inner`, but sums may be taken in any order, as those in kernels may, so that they are vectorised."""
    return numba.njit(fastmath=FAST | {"reassoc"}, error_model="numpy")(function)  # type: ignore[no-any-return]


_kernels: set[str] = set()


class _Announce(event.Listener):  # type: ignore[misc]
    """Say what the pause is when a kernel has to be compiled; one that is read from the cache stays silent."""

    said = False

    def on_start(self, event: Any) -> None:
        function = event.data["dispatcher"].py_func
        if not self.said and function.__module__.startswith(__package__) and function.__qualname__ in _kernels:
            self.said = True
            say("moemamba: compiling the CPU kernels, once (10 s to a minute)")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announce())


def run(compiled: Callable[..., None], tasks: int, work: int, *arguments: Any) -> None:
    """Do all tasks of a kernel, over `torch.get_num_threads()` threads if `work` (inner iterations) is worth it."""
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1 or work < WORTH_THREADS:
        compiled(0, tasks, *arguments)
        return
    bounds = [tasks * i // threads for i in range(threads + 1)]
    others = [_pool().submit(compiled, *bounds[i : i + 2], *arguments) for i in range(1, threads)]
    compiled(*bounds[:2], *arguments)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="moemamba")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


# Kernels see nothing but addresses: the functions from here to `located` are the only ones that make tensors for them
# and hand them over, whatever torch's default dtype and device are.


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
    if not (tensor.shape == shape and tensor.dtype in _STREAMED and channels == 1 and _is_here(tensor)):
        raise _mistaken(tensor, f"rows of float32 or bfloat16 of shape {shape}")
    size = tensor.element_size()
    return tensor.data_ptr(), batch * size, time * size, size


def located(*tensors: Tensor | None) -> list[int] | None:
    """Where tensors lie whose shapes are known, for `floats`; None if one is not contiguous float32 here.

    This is for the ops of generation, whose checks have to be short; what they cannot read goes another way.
    """
    places = []
    for tensor in tensors:
        if tensor is None:
            places.append(0)
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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond also where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through the dispatcher, where autograd and torch.compile see it.

    A plain call skips it, because its overhead would be most of the time of generating a token.
    """
    return wants_grad(*tensors) or torch.compiler.is_compiling() or type(tensors[0]) is not Tensor


def summed(parts: Tensor) -> Tensor:
    """The sum of a contiguous float32 tensor over its first dimension, in order, whatever the number of threads."""
    total = new(*parts.shape[1:])
    _sum(0, 1, parts.shape[0], total.numel(), address(parts, *parts.shape), address(total, *total.shape))
    return total


# --- inside kernels: memory ---


def _instruction(argument: Any, result: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """A function for kernels that is a single LLVM instruction: `emit(builder, value)` writes it."""

    def describe(context: Any, x: Any) -> Any:
        return result(argument), lambda context, builder, signature, values: emit(builder, values[0])

    return intrinsic(describe)


_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)
_nearest = _instruction(
    types.float32, types.float32, lambda b, x: b.call(b.module.declare_intrinsic("llvm.nearbyint", [_FLOAT]), [x])
)
_integer = _instruction(types.float32, types.uint32, lambda b, x: b.fptosi(x, _INT32))
_bits = _instruction(types.float32, types.uint32, lambda b, x: b.bitcast(x, _INT32))
_from_bits = _instruction(types.uint32, types.float32, lambda b, x: b.bitcast(x, _FLOAT))
_float_pointer = _instruction(
    types.int64, types.CPointer(types.float32), lambda b, x: b.inttoptr(x, _FLOAT.as_pointer())
)
_half_pointer = _instruction(
    types.int64, types.CPointer(types.uint16), lambda b, x: b.inttoptr(x, ir.IntType(16).as_pointer())
)
_byte_pointer = _instruction(
    types.int64, types.CPointer(types.uint8), lambda b, x: b.inttoptr(x, ir.IntType(8).as_pointer())
)


@inner
def floats(address: int, shape: Any) -> Any:
    """A contiguous float32 array at an address."""
    return carray(_float_pointer(address), shape)


@inner
def bytes_at(address: int, shape: Any) -> Any:
    """A contiguous uint8 array at an address (of int8, where no number is negative)."""
    return carray(_byte_pointer(address), shape)


@inner
def read(block: Any, tensor: Rows, b: int, start: int, first: int, count: int) -> None:
    """block[j, :count] = tensor[b, start + j, first : first + count] as float32, for every row j of the block."""
    address, batch, time, size = tensor
    for j in range(block.shape[0]):
        place = address + b * batch + (start + j) * time + first * size
        if size == 4:
            source = carray(_float_pointer(place), count)
            for c in range(count):
                block[j, c] = source[c]
        else:
            halves = carray(_half_pointer(place), count)
            for c in range(count):
                block[j, c] = _from_bits(np.uint32(halves[c]) << np.uint32(16))


@inner
def write(block: Any, tensor: Rows, b: int, start: int, first: int, count: int) -> None:
    """The inverse of `read`, rounding to the nearest bfloat16, ties to even."""
    address, batch, time, size = tensor
    for j in range(block.shape[0]):
        place = address + b * batch + (start + j) * time + first * size
        if size == 4:
            target = carray(_float_pointer(place), count)
            for c in range(count):
                target[c] = block[j, c]
        else:
            halves = carray(_half_pointer(place), count)
            for c in range(count):
                bits = _bits(block[j, c])
                rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                halves[c] = np.uint16(rounded if block[j, c] == block[j, c] else np.uint32(0x7FC0))


@inner
def load_columns(tile: Any, matrix: int, first: int, count: int) -> None:
    """tile (m, TILE) = the transpose of rows first .. first + count - 1 of a float32 (?, m) matrix; zero if absent."""
    tile[:] = _ZERO
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


# --- inside kernels: arithmetic ---

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
# 2^x = 1 + x p(x) on [-1/2, 1/2], fitted for the largest relative error: 9e-8, and exact at zero.
_P0, _P1, _P2, _P3, _P4 = map(
    np.float32,
    (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149),
)
# atanh(s) = s q(s²) / 2 on [0, 1/3]: 4e-9.
_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    np.float32, (2.0, 0.6666631698608398, 0.40024909377098083, 0.27960604429244995, 0.2817833423614502)
)


@inner
def exp2(x: Any) -> Any:
    """2^x, flushed to 2^-126 and capped at 2^127; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    whole = _nearest(x)
    x = x - whole
    p = ((((_P4 * x + _P3) * x + _P2) * x + _P1) * x + _P0) * x + _ONE
    return _from_bits(_bits(p) + (_integer(whole) << np.uint32(23)))


@inner
def sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + exp2(-LOG2E * x))


@inner
def softplus(x: Any) -> Any:
    """log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x|, and log(1 + y) = 2 atanh(y / (2 + y))."""
    y = exp2(-LOG2E * abs(x))
    s = y / (_TWO + y)
    q = s * s
    return max(x, _ZERO) + s * ((((_Q4 * q + _Q3) * q + _Q2) * q + _Q1) * q + _Q0)
