"""Which backend an op uses: the fastest that can run, unless one is asked for by name."""

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cuda_runtime

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

_forced: str | None = None


def choose(op: str, tensor: Tensor) -> str:
    """The backend for `op` on tensors like this one.

    Raises:
        RuntimeError: the backend asked for by `ops.backend` has no way to run on this device.
    """
    device = tensor.device.type
    if _forced is not None:
        if op not in KERNELS[_forced]:
            return "reference"
        reason = why_not(_forced, device)
        if reason is None and tensor.dtype == torch.float64:
            reason = f'the {_forced} backend accumulates in float32; use ops.backend("reference") for float64'
        if reason:
            raise RuntimeError(reason)
        return _forced
    for natural in ("cuda", "triton") if device == "cuda" else ("cpu",):
        if tensor.dtype != torch.float64 and op in KERNELS[natural] and why_not(natural, device) is None:
            return natural
    return "reference"


def implementation(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `op` on tensors like this one: same name and arguments in every backend."""
    backend: ModuleType
    match choose(op, tensor):  # imported here, since kernels take their time to load; torch.compile traces imports
        case "cpu":
            from . import cpu

            backend = cpu
        case "triton":
            from . import triton

            backend = triton
        case "cuda" if op == "causal_conv1d":
            from .triton_conv import conv_with_cuda

            return conv_with_cuda
        case "cuda":
            from . import cuda_scan

            return cuda_scan.scan_or_triton if _forced is None else cuda_scan.selective_scan
        case _:
            from . import reference

            backend = reference
    return getattr(backend, op)  # type: ignore[no-any-return]


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
    """Ask for a backend by name, or for the natural choice again with None; returns what was asked for before."""
    global _forced
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
        reason = available(name)
        if reason:
            raise RuntimeError(reason)
    previous, _forced = _forced, name
    return previous
