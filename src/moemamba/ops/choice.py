"""Which backend an op uses: the fastest that can run, unless one is asked for by name."""

import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .derivatives import may_be_transformed, transformed
from .kit import cuda as cuda_runtime

BACKENDS = ("reference", "cpu", "triton", "cuda")

INSTALLED = {
    "cpu": importlib.util.find_spec("numba") is not None,
    "triton": importlib.util.find_spec("triton") is not None,
}

# The ops that a backend has kernels for; others run on the reference.
KERNELS: dict[str, tuple[str, ...]] = {
    "reference": (),
    "cpu": (
        "causal_conv1d",
        "expert_feedforward",
        "expert_linear",
        "grouped_linear",
        "linear",
        "linear_cross_entropy",
        "mamba_step",
        "rms_norm",
        "route_with_stats",
        "selective_scan",
    ),
    "triton": (
        "causal_conv1d",
        "expert_feedforward",
        "expert_linear",
        "grouped_linear",
        "linear_argmax",
        "linear_beside",
        "linear_cross_entropy",
        "linear_float32",
        "mamba_step",
        "places_in_queues",
        "route",
        "route_with_totals",
        "selective_scan",
    ),
    # The convolution's gradients alone are CUDA C++; its forward pass is Triton's.
    "cuda": ("causal_conv1d", "selective_scan") if INSTALLED["triton"] else ("selective_scan",),
}

_forced: ContextVar[str | None] = ContextVar("moemamba_backend", default=None)
Function = TypeVar("Function", bound=Callable[..., Any])


# torch.compile cannot read the variable: what is compiled keeps the choice that it was compiled with.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def forced() -> str | None:
    """The backend that was asked for in this context."""
    return _forced.get()


def choose(op: str, *arguments: Any) -> str:
    """The backend for `op` on arguments like these, of which the first is a tensor.

    The kernels compute the gradients of a backward pass. Under torch.func and in forward mode the natural choice is the
    reference, which is right there too.

    Raises:
        RuntimeError: the backend asked for by `ops.backend` has no way to do this here.
    """
    tensor: Tensor = arguments[0]
    device, name = tensor.device.type, forced()
    if name is not None:
        if op not in KERNELS[name]:
            return "reference"
        reason = why_not(name, device)
        if reason is None and tensor.dtype == torch.float64:
            reason = f'the {name} backend accumulates in float32; use ops.backend("reference") for float64'
        if reason is None and transformed(*arguments):
            reason = f'the {name} backend knows neither torch.func nor forward mode; use ops.backend("reference")'
        if reason:
            raise RuntimeError(reason)
        return name
    for natural in _NATURAL.get(device, ()):
        if op in KERNELS[natural] and tensor.dtype != torch.float64 and why_not(natural, device) is None:
            return "reference" if may_be_transformed() and transformed(*arguments) else natural
    return "reference"


_NATURAL = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def compute(op: str, *arguments: Any) -> Any:
    """Call `op` in the backend chosen for its arguments: they have the same order in every backend."""
    return _implementation(op, choose(op, *arguments))(*arguments)


def _implementation(op: str, name: str) -> Callable[..., Any]:
    backend: ModuleType
    match name:  # imported here, since kernels take their time to load; torch.compile traces imports
        case "cpu":
            from . import cpu

            backend = cpu
        case "triton":
            from . import triton

            backend = triton
        case "cuda" if op == "causal_conv1d":
            from .conv.triton import conv_with_cuda

            return conv_with_cuda
        case "cuda":
            from .scan import cuda as cuda_scan

            return _scan_where_it_holds if forced() is None else cuda_scan.selective_scan
        case _:
            from . import reference

            backend = reference
    return getattr(backend, op)  # type: ignore[no-any-return]


def _scan_where_it_holds(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, *rest: Any
) -> Any:
    """The scan in CUDA where nobody asked for it: what its kernels do not cover, others do."""
    from .scan import cuda as cuda_scan

    covered = cuda_scan.why_not(u, dt, A, B, C, z) is None
    other = "triton" if INSTALLED["triton"] else "reference"
    scan = cuda_scan.selective_scan if covered else _implementation("selective_scan", other)
    return scan(u, dt, A, B, C, D, z, *rest)


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device ("cpu", "cuda"): one sentence with the remedy, or None if it can."""
    if name == "triton":
        if not INSTALLED["triton"]:
            return "the triton backend needs the package triton, which comes with PyTorch's CUDA builds on Linux"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"the triton backend runs on CUDA tensors, and these are on {device}; move the model to a GPU, or set "
                "TRITON_INTERPRET=1 to step through the kernels on the CPU"
            )
    if name == "cuda":
        if device != "cuda":
            return f"the cuda backend runs on CUDA tensors, and these are on {device}; move the model to a GPU"
        return cuda_runtime.why_not()
    if name == "cpu":
        if not INSTALLED["cpu"]:
            return "the cpu backend needs the package numba: pip install numba"
        if device != "cpu":
            return f"the cpu backend runs on CPU tensors, and these are on {device}; move the model to the CPU"
    return None


def available(name: str) -> str | None:
    """Why no device of this machine can run a backend, or None if one can."""
    reasons = [why_not(name, device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
    return None if None in reasons else reasons[-1]


def force(name: str | None) -> str | None:
    """Ask for a backend by name in this context, or for the natural choice again with None.

    Returns what was asked for before.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
        reason = available(name)
        if reason:
            raise RuntimeError(reason)
    previous = _forced.get()
    _forced.set(name)
    return previous


def bound(function: Function) -> Function:
    """A function that asks for the backend that is asked for here and now, wherever it is called.

    For what runs again in the backward pass: autograd has threads of its own.
    """
    if torch.compiler.is_compiling():
        return function
    name = forced()

    def call(*args: Any, **kwargs: Any) -> Any:
        token = _forced.set(name)
        try:
            return function(*args, **kwargs)
        finally:
            _forced.reset(token)

    return call  # type: ignore[return-value]
