"""Which backend an op uses: the fastest that can run, unless one is asked for by name.

A backend is a line in `BACKENDS`, and what its kernels share is a file in `kit/`. An op is known by what its family
declares: its reference, and a door for each backend that has kernels for it.
"""

import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .derivatives import may_be_transformed, transformed
from .kit import cuda as cuda_runtime
from .kit.packed import NO_GRADIENT, Packed, Weight, unpacked

Function = TypeVar("Function", bound=Callable[..., Any])


class Backend(NamedTuple):
    """Where kernels of one kind can run."""

    why_not: Callable[[str], str | None]
    """why it cannot run on a kind of device ("cpu", "cuda"): one sentence with the remedy, or None if it can"""
    natural: tuple[str, ...] = ()
    """kinds of device where it is chosen without being asked for"""


class Door(NamedTuple):
    """A backend's way into one op."""

    load: Callable[[], Callable[..., Any]]
    """imports the kernels and returns the function, whose arguments are the reference's. By a statement within it,
    since kernels take their time to load, and torch.compile traces import statements"""
    holds: str = "both directions"
    """what its kernels compute of the op: both directions, no gradient, or the gradient alone"""
    why_not: Callable[[str], str | None] = lambda device: None
    """why it cannot run where its backend can, by kind of device"""
    supports: Callable[..., str | None] | None = None
    """why it cannot compute what an op's arguments, in order, ask for; None where it can, and for a door that computes
    all of its op"""
    asked: bool = False
    """whether it is taken only where its backend is asked for by name, as kernels are that nobody has measured yet"""


class Op(NamedTuple):
    reference: Callable[..., Any]
    doors: dict[str, Door]
    """by backend, the fastest first"""


_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}


def _why_not_cpu(device: str) -> str | None:
    if not _INSTALLED["numba"]:
        return "the cpu backend needs the package numba: pip install numba"
    if device != "cpu":
        return f"the cpu backend runs on CPU tensors, and these are on {device}; move the model to the CPU"
    return None


def _why_not_triton(device: str) -> str | None:
    if not _INSTALLED["triton"]:
        return "the triton backend needs the package triton, which comes with PyTorch's CUDA builds on Linux"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the triton backend runs on CUDA tensors, and these are on {device}; move the model to a GPU, or set "
            "TRITON_INTERPRET=1 to step through the kernels on the CPU"
        )
    return None


def _why_not_cuda(device: str) -> str | None:
    if device != "cuda":
        return f"the cuda backend runs on CUDA tensors, and these are on {device}; move the model to a GPU"
    return cuda_runtime.why_not()


BACKENDS: dict[str, Backend] = {
    "reference": Backend(lambda device: None),
    "cpu": Backend(_why_not_cpu, natural=("cpu",)),
    "triton": Backend(_why_not_triton, natural=("cuda",)),
    "cuda": Backend(_why_not_cuda, natural=("cuda",)),
}

OPS: dict[str, Op] = {}


def declare(op: str, reference: Callable[..., Any], **doors: Door) -> None:
    """What a family says of an op when it is imported: what it means, and its doors, the fastest first."""
    OPS[op] = Op(reference, doors)


_forced: ContextVar[str | None] = ContextVar("moemamba_backend", default=None)


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
    device, name, doors = tensor.device.type, forced(), OPS[op].doors
    if name is not None:
        if name not in doors:
            return "reference"
        reason = why_not(name, device)
        if reason is None and (doors[name].why_not(device) or unsupported(doors[name], arguments)):
            return "reference"
        if reason is None and tensor.dtype == torch.float64:
            reason = f'the {name} backend accumulates in float32; use ops.backend("reference") for float64'
        if reason is None and transformed(*arguments):
            reason = f'the {name} backend knows neither torch.func nor forward mode; use ops.backend("reference")'
        if reason:
            raise RuntimeError(reason)
        return name
    if tensor.dtype != torch.float64:
        for natural in doors:
            runs = device in BACKENDS[natural].natural and not doors[natural].asked
            runs = runs and why_not(natural, device) is None and doors[natural].why_not(device) is None
            if runs and not unsupported(doors[natural], arguments):
                return "reference" if may_be_transformed() and transformed(*arguments) else natural
    return "reference"


def unsupported(door: Door, arguments: tuple[Any, ...]) -> str | None:
    """Why a door cannot compute these arguments of its op, of which the last may be missing; None if it can."""
    return None if door.supports is None else door.supports(*arguments)


def compute(op: str, *arguments: Any) -> Any:
    """Call `op` in the backend chosen for its arguments: they have the same order in every backend."""
    return implementation(op, choose(op, *arguments))(*arguments)


def expect_no_gradient(x: Tensor) -> None:
    """Of what weights of 8 bits read.

    Raises:
        RuntimeError: a gradient of it is wanted.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(NO_GRADIENT)


def readable(op: str, x: Tensor, *weights: Weight) -> tuple[Weight, ...]:
    """Weights as the kernels chosen for x read them: those of 8 bits as they are by the CPU's, others have them dense.

    Raises:
        RuntimeError: a gradient is wanted through one of 8 bits.
    """
    if not any(isinstance(weight, Packed) for weight in weights):
        return weights
    expect_no_gradient(x)
    if x.dtype == torch.float32 and choose(op, x) == "cpu":
        return weights
    return tuple(unpacked(weight, x.dtype) for weight in weights)


def implementation(op: str, name: str) -> Callable[..., Any]:
    """The function that computes an op in a backend that has a door for it, or in the reference."""
    return OPS[op].reference if name == "reference" else OPS[op].doors[name].load()


def load_kernels(name: str) -> None:
    """Import all kernels of a backend, so that PyTorch knows its ops by name: `torch.export.load` needs them."""
    for op in OPS.values():
        if name in op.doors:
            op.doors[name].load()


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device ("cpu", "cuda"): one sentence with the remedy, or None if it can."""
    return BACKENDS[name].why_not(device)


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
