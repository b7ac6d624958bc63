"""Which backend an op uses: the fastest that can run, unless one is asked for by name."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton")

# The file that holds each op's kernels, by backend; an op that is missing runs on the reference.
KERNELS: dict[str, dict[str, str]] = {
    "reference": {},
    "cpu": {},
    "triton": {"selective_scan": "triton_scan", "causal_conv1d": "triton_conv"},
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
        if reason:
            raise RuntimeError(reason)
        return _forced
    natural = "triton" if device == "cuda" else "cpu"
    if tensor.dtype != torch.float64 and op in KERNELS[natural] and why_not(natural, device) is None:
        return natural
    return "reference"


def implementation(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `op` on tensors like this one: same name and arguments in every backend's file."""
    file = KERNELS[choose(op, tensor)].get(op, "reference")
    return getattr(importlib.import_module(f"{__package__}.{file}"), op)  # type: ignore[no-any-return]


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device ("cpu", "cuda"): one sentence with the remedy, or None if it can."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the triton backend needs the package triton, which comes with PyTorch's CUDA builds on Linux"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"the triton backend runs on CUDA tensors, and these are on {device}; move the model to a GPU, or set "
                "TRITON_INTERPRET=1 to step through the kernels on the CPU"
            )
    if name == "cpu":
        if importlib.util.find_spec("numba") is None:
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
