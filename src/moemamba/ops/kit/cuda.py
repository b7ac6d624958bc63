"""CUDA C++ kernels without a compiler at install: NVRTC, which comes with PyTorch, compiles them at their first use.

What it makes is kept in `$XDG_CACHE_HOME/moemamba` (or `~/.cache/moemamba`), named after source, options and GPU, so
that later processes start at once.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from ...host.files import cache_folder, keep_recent, replace, used

KEPT = 256  # compiled kernels in the cache, a few for each kind of GPU and version of the sources
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what `elements.cu` calls them
SHARED_MEMORY_OPT_IN = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not() -> str | None:
    """Why these kernels cannot run here: one sentence, or None if they can."""
    return _why_not()


@functools.cache
def _why_not() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip or not torch.version.cuda:
        return "the cuda backend needs an NVIDIA GPU; the triton backend runs on others"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the cuda backend needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    try:
        _nvrtc(), _driver()
    except OSError as error:
        return f"the cuda backend needs NVRTC and the CUDA driver: {error}"
    return None


def source(*files: Path) -> str:
    """The text of kernels, after what all of them share."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (Path(__file__).with_name("elements.cu"), *files))


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def plain(tensor: Tensor | None) -> Tensor | None:
    """The same tensor as contiguous float32, if there is one."""
    return None if tensor is None else tensor.float().contiguous()


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("name", ctypes.c_int),
        ("gap", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("blocks", "threads") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_EARLY = _Attribute(name=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Module:
    """Kernels compiled from one source with some constants, for one GPU."""

    def __init__(self, source: str, constants: dict[str, int], device: int):
        self.handle = ctypes.c_void_p()
        self.functions: dict[tuple[str, int], ctypes.c_void_p] = {}
        self.cubin = _compiled(source, constants, torch.cuda.get_device_capability(device))
        self.early = torch.cuda.get_device_capability(device) >= (9, 0)
        self.device = device
        _enter(device)
        _check(_driver().cuModuleLoadData(ctypes.byref(self.handle), self.cubin), "loading a kernel")

    def launch(self, kernels: list[tuple[str, int, int, int]], arguments: bytes, waiting: bool = False) -> None:
        """Start kernels (name, blocks, threads, bytes of shared memory), one after the other, on the current stream.

        Each has one parameter, the same struct. The module's device must be the current one. If `waiting`, all but the
        first wait for the one before by themselves (griddepcontrol), so that their launch is not waited for.
        """
        _enter(self.device)
        parameters = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        start = _driver().cuLaunchKernel
        for index, (name, blocks, threads, shared) in enumerate(kernels):
            function = self.functions.get((name, shared)) or self._function(name, shared)
            if waiting and index and self.early:
                how = _Launch(blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.pointer(_EARLY), 1)
                status = _driver().cuLaunchKernelEx(ctypes.byref(how), function, parameters, None)
            else:
                status = start(function, blocks, 1, 1, threads, 1, 1, shared, stream, parameters, None)
            if status:
                _check(status, f"the kernel {name}")

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        function = self.functions[name, shared] = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode()), name)
        if shared > 48 * 1024:
            _check(_driver().cuFuncSetAttribute(function, SHARED_MEMORY_OPT_IN, shared), name)
        return function


def _enter(device: int) -> None:
    """Give this thread PyTorch's context if it has none, as one of autograd's before PyTorch's first kernel there."""
    current = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(current)), "asking for the context")
    if not current:
        _check(_driver().cuCtxSetCurrent(_context(device)), "entering the context")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """A GPU's primary context, which PyTorch uses too."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(number), device), "finding the GPU")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "asking for the GPU's context")
    return context


def _compiled(source: str, constants: dict[str, int], capability: tuple[int, int]) -> bytes:
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "--use_fast_math"]
    options += [f"-D{name}={value}" for name, value in constants.items()]
    key = hashlib.sha256("\n".join([source, *options, str(torch.version.cuda)]).encode()).hexdigest()[:32]
    folder = cache_folder()
    if folder is None:
        return _compile(source, options)
    path = folder / f"{key}.cubin"
    try:
        cubin = path.read_bytes()
        used(path)
        return cubin
    except OSError:
        cubin = _compile(source, options)
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs a compilation a process
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, cubin)  # complete or absent, whoever else writes it
        keep_recent(folder, r"[0-9a-f]{32}\.cubin", KEPT)
    return cubin


def _compile(source: str, options: list[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"moemamba.cu", 0, None, None)
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC refuses a kernel; please report this:\n{log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    nvidia = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (nvidia.submodule_search_locations or [])] if nvidia else []
    for place in [path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]:
        try:
            for part in place.parent.glob(
                "libnvrtc-builtins.so*"
            ):  # NVRTC looks for it where the system's libraries are
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(place))
        except OSError:
            continue
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)
    raise OSError(f"{name} is not to be found beside PyTorch or among the system's libraries")


def _check(status: int, what: str) -> None:
    if status:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"CUDA, {what}: {(message.value or b'unknown error').decode()}")
