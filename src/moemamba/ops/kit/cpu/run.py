"""Compiling a kernel once, and running it over threads.

A kernel is a numba function `kernel(first, last, *arguments)` that does the tasks first .. last - 1 of a list that the
work was cut into. The cut depends on the shapes alone and tasks share no output, so that results are bit for bit the
same for every number of threads.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, event
from numba.extending import intrinsic

from ....host.files import cache_folder, expanded, keep_recent, used, writable
from ....host.terminal import say

KEPT = 4  # states of the sources whose compiled kernels are kept
WORTH_THREADS = 1 << 19  # inner iterations, some 100 µs; waking a thread takes tens

# `contract` lets multiplication and addition fuse; nothing that could change what infinities and NaN do.
FAST = {"contract", "nsz"}

_config: Any = numba.config
_OPS = Path(__file__).parents[2]


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile at the first call, for this machine's vector units, and keep the result on disk if that can be."""
    return _compiled(function, FAST | {"reassoc"})


def exact_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `kernel`, of `exact` functions: no sum is taken in another order than is written."""
    return _compiled(function, set())


def _compiled(function: Callable[..., Any], fast: set[str]) -> Callable[..., Any]:
    folder = _cache_folder()
    before, _config.CACHE_DIR = _config.CACHE_DIR, folder
    try:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fast}
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
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in kernel_sources())).hexdigest()[:16]
    # Not in the package's own folder, unless there is no other: what pip has not installed it does not remove.
    own = [Path(_config.CACHE_DIR)] if _config.CACHE_DIR else []
    others = [folder for folder in (cache_folder(), expanded("~/.cache/moemamba")) if folder and folder.is_absolute()]
    others.sort(key=lambda base: not (base / f"kernels-{sources}").is_dir())  # first where they are compiled already
    bases = [*own, *others, _OPS / "__pycache__"]
    for base in bases:
        if writable(folder := base / f"kernels-{sources}"):
            used(folder)
            keep_recent(base, r"kernels-[0-9a-f]{16}", KEPT)
            return str(folder)
    return ""


def kernel_sources() -> list[Path]:
    """The files whose functions and constants are compiled into kernels."""
    own = [path for path in _OPS.rglob("*.py") if any(part.startswith("cpu") for part in path.relative_to(_OPS).parts)]
    return sorted([*own, _OPS / "packing.py"])


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call. Without numba's check for division by zero, which would keep loops scalar."""
    return numba.njit(fastmath=FAST, error_model="numpy")(function)  # type: ignore[no-any-return]


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call, with the roundings that are written and no others: the same bits wherever LLVM puts
    it. What is to be fused is written `fma`."""
    return numba.njit(error_model="numpy")(function)  # type: ignore[no-any-return]


def apart(function: Callable[..., None]) -> Any:
    """An `exact` function of integers that is compiled by itself, once, instead of into each kernel that calls it.

    Kernels call it as `function(address, *arguments)`: the address is `entry(function)`, which they get as an argument,
    since they come from the disk as they were and it is another in each process.
    """
    compiled: Any = exact_kernel(function)
    described = types.void(*[types.int64] * len(inspect.signature(function).parameters))

    def describe(context: Any, address: Any, *arguments: Any) -> Any:
        def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = [target.get_value_type(kind) for kind in (described.return_type, *described.args)]
            pointer = builder.inttoptr(values[0], ir.FunctionType(kinds[0], kinds[1:]).as_pointer())
            builder.call(pointer, cgutils.unpack_tuple(builder, values[1]))
            return target.get_dummy_value()

        return types.void(types.int64, types.StarArgTuple(described.args)), emit

    @cache
    def found() -> int:
        compiled.compile(described)
        made = compiled.overloads[described.args]
        return made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)  # type: ignore[no-any-return]

    called = intrinsic(describe)
    _entries[called] = found
    return called


def entry(function: Any) -> int:
    """Where a function that is compiled `apart` begins. It is compiled at the first call."""
    return _entries[function]()


def named(*values: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Below `exact`, `kernel` and their like, for a function that is made several times, once for these values.

    They become part of its name. A kernel that comes from the disk knows the functions that are compiled into it by
    name and a count, and where one of the same name and count is there already it calls that.
    """

    def rename(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = "_".join(map(str, (function.__qualname__, *values)))
        return function

    return rename


_kernels: set[str] = set()
_entries: dict[Any, Callable[[], int]] = {}
_PACKAGE = __name__.removesuffix("kit.cpu.run")


class _Announce(event.Listener):  # type: ignore[misc]
    """Say what the pause is when a kernel has to be compiled; one that is read from the cache stays silent."""

    said = False

    def on_start(self, event: Any) -> None:
        function = event.data["dispatcher"].py_func
        if not self.said and function.__module__.startswith(_PACKAGE) and function.__qualname__ in _kernels:
            self.said = True
            say("moemamba: compiling the CPU kernels, once (10 s to a minute)")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announce())


def run(compiled: Callable[..., None], tasks: int, work: int, *arguments: Any) -> None:
    """Do all tasks of a kernel, over `torch.get_num_threads()` threads if `work` (inner iterations) is worth it."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1 or work < WORTH_THREADS:
        compiled(0, tasks, *arguments)
        return
    bounds = [tasks * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    try:
        for i in range(1, threads):
            others.append(_pool().submit(compiled, *bounds[i : i + 2], *arguments))
        compiled(*bounds[:2], *arguments)
    finally:
        _join(others)
    for other in others:
        other.result()


def _join(others: list[Future[None]]) -> None:
    """Wait for other threads, Ctrl-C or not: whoever called the kernel frees what they are still writing to."""
    try:
        wait(others)
    except BaseException:
        _join(others)
        raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="moemamba")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
