"""Compiling a kernel once, and running it over threads.

A kernel is a numba function `kernel(first, last, *arguments)` that does the tasks first .. last - 1 of a list that the
work was cut into. The cut depends on the shapes alone and tasks share no output, so that results are bit for bit the
same for every number of threads.
"""

import gc
import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, event
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from ....host.files import cache_folder, expanded, keep_recent, used, writable
from ....host.terminal import say

KEPT = 4  # states of the sources whose compiled kernels are kept
WORTH_THREADS = 1 << 19  # inner iterations, some 100 µs; waking a thread takes tens

# `contract` lets multiplication and addition fuse; nothing that could change what infinities and NaN do.
FAST = {"contract", "nsz"}

# Functions that kernels call are compiled without wrappers for Python and C, which take most of the time.
_CALLED: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_config: Any = numba.config
_INTEGER = ir.IntType(64)
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
    return numba.njit(fastmath=FAST, **_CALLED)(function)  # type: ignore[no-any-return]


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call, with the roundings that are written and no others: the same bits wherever LLVM puts
    it. What is to be fused is written `fma`."""
    return numba.njit(**_CALLED)(function)  # type: ignore[no-any-return]


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """An `exact` function that numba writes into each that calls it, before it compiles that: for those in which LLVM
    has much to do, which it otherwise does once for the function and once for every caller. Of `exact_kernel`s only,
    since there it has the roundings of its caller."""
    return numba.njit(inline="always", **_CALLED)(function)  # type: ignore[no-any-return]


def apart(place: int) -> Callable[[Callable[..., None]], Any]:
    """An `exact` function of integers that is compiled by itself, once, instead of into each kernel that calls it.

    Kernels call it as `function(at, *arguments)`: `at` are addresses, that at `place` is `entry(function)`. They get
    them as an argument, since they come from the disk as they were and functions lie elsewhere in each process. In the
    place of integers there may be an array, which stands for its address, and a tuple of integers, for all of them.
    """

    def declare(function: Callable[..., None]) -> Any:
        compiled: Any = exact_kernel(function)
        described = types.void(*[types.int64] * len(inspect.signature(function).parameters))

        def describe(context: Any, at: Any, *arguments: Any) -> Any:
            kinds = [each if isinstance(each, types.Array | types.UniTuple) else types.int64 for each in arguments]

            def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
                given = []
                for kind, value in zip(kinds, cgutils.unpack_tuple(builder, values[1]), strict=True):
                    if isinstance(kind, types.Array):
                        given.append(builder.ptrtoint(make_array(kind)(target, builder, value).data, _INTEGER))
                    else:
                        given += cgutils.unpack_tuple(builder, value) if isinstance(kind, types.UniTuple) else [value]
                if len(given) != len(described.args):
                    raise TypeError(f"{function.__name__} takes {len(described.args)} integers, and gets {len(given)}")
                called = ir.FunctionType(ir.VoidType(), [_INTEGER] * len(given)).as_pointer()
                address = builder.extract_value(values[0], place)
                builder.call(builder.inttoptr(address, called), given)
                return target.get_dummy_value()

            return types.void(at, types.StarArgTuple(kinds)), emit

        @cache
        def found() -> int:
            compiled.compile(described)
            made = compiled.overloads[described.args]
            return made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)  # type: ignore[no-any-return]

        called = intrinsic(describe)
        _entries[called] = found
        return called

    return declare


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


_entries: dict[Any, Callable[[], int]] = {}
_PACKAGE = __name__.removesuffix("kit.cpu.run")


class _Compiling(event.Listener):  # type: ignore[misc]
    """Say what the pause is when a kernel has to be compiled; one that is read from the cache stays silent.

    Meanwhile no garbage is collected: that would be searched for ten times in all that torch and numba hold.
    """

    said, depth, collects = False, 0, False

    def on_start(self, event: Any) -> None:
        if self.depth == 0 and not event.data["dispatcher"].py_func.__module__.startswith(_PACKAGE):
            return  # somebody else's
        if not self.said:
            self.said = True
            say("moemamba: compiling the CPU kernels, once (some seconds)")
        if self.depth == 0:
            self.collects = gc.isenabled()
            gc.disable()
        self.depth += 1

    def on_end(self, event: Any) -> None:
        if self.depth:
            self.depth -= 1
            if self.depth == 0 and self.collects:
                gc.enable()


event.register("numba:compile", _Compiling())


def run(compiled: Callable[..., None], tasks: int, work: int, *arguments: Any, space: int = 0) -> None:
    """Do all tasks of a kernel, over `torch.get_num_threads()` threads if `work` (inner iterations) is worth it.

    With `space`, each thread has room for so many numbers, whose address the kernel gets behind `first` and `last`.
    """
    threads = 1 if work < WORTH_THREADS else max(1, min(torch.get_num_threads(), tasks))
    if threads == 1 and not space:
        compiled(0, tasks, *arguments)  # at once, for it is done for every token
        return
    apart = -(-space // 16) * 16  # 64 bytes: no two threads write to one line of a cache
    spare = torch.empty(threads * apart, dtype=torch.float32, device="cpu")
    if threads == 1:
        compiled(0, tasks, spare.data_ptr(), *arguments)
        return
    places = [(spare.data_ptr() + 4 * apart * i,) if space else () for i in range(threads)]
    bounds = [tasks * i // threads for i in range(threads + 1)]
    own, *shares = [(*bounds[i : i + 2], *places[i], *arguments) for i in range(threads)]
    others: list[Future[None]] = [Future() for _ in shares]
    try:
        for other, share in zip(others, shares, strict=True):
            _pool().submit(_do, other, compiled, *share)
        compiled(*own)
        for other in others:
            other.result()
    except BaseException:  # KeyboardInterrupt, as a rule; the caller frees what the others write to
        # All that have not begun are called off; some may never have been handed to a thread, and are not waited for.
        while running := [other for other in others if not (other.cancel() or other.done())]:
            with suppress(BaseException):  # of those that interrupt the waiting the first one counts
                wait(running)
        raise


def _do(share: Future[None], compiled: Callable[..., None], *arguments: Any) -> None:
    """A thread's share, unless it has been called off."""
    if share.set_running_or_notify_cancel():
        try:
            compiled(*arguments)
        except BaseException as mistake:
            share.set_exception(mistake)
        else:
            share.set_result(None)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="moemamba")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
