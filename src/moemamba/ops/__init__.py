"""Pure functions on tensors: the operations that the layers are made of.

Each function here checks its arguments and hands them to a backend: "reference" (plain PyTorch), "cpu" (compiled
loops), "triton" (GPU kernels) or "cuda" (on NVIDIA GPUs the scan and the convolution's gradients). A folder is a family
of ops: its face `__init__.py`, which declares a door for each backend that has kernels, `reference.py`, which says what
they mean, and the kernels. All compute the same function with the same gradients. The fastest that can run is chosen
from the tensors; `backend("reference")` overrides the choice. The kernels know the backward pass alone: under
torch.func, and where an argument carries a forward-mode derivative, the choice is the reference, which is right there.

What is not of a sequence, padding or another sequence of its row, never reaches it, forward or backward, be it infinite
or not a number.

Letters, here and everywhere: b batch, l length, t tokens (b times l), d d_model, i d_inner, n d_state, k d_conv or
top_k, r dt_rank, e n_experts, f d_expert, v vocabulary. Upper-case A, B, C, D are only the state-space model's.
"""

import warnings
from importlib import import_module
from types import TracebackType
from typing import Any

from .attention import attention, attention_step, rotary
from .choice import BACKENDS, available, bound, choose, force, load_kernels, why_not
from .conv import causal_conv1d
from .dense import linear, linear_add, linear_beside, norm_linear, prepare_rms_norm, rms_norm
from .derivatives import transformed
from .experts import activate, expert_feedforward, expert_linear, prepare_experts
from .head import linear_cross_entropy
from .kit.packed import Packed, pack, unpacked
from .mamba_step import fuses_mamba_step, linear_argmax, mamba_step, mamba_step_of, prepare_mamba_step
from .moe_step import fuses_moe_step, moe_step, why_not_moe_step
from .router import prepare_router, router, router_choices, router_means
from .scan import selective_scan

__all__ = [
    "BACKENDS",
    "Packed",
    "activate",
    "attention",
    "attention_step",
    "available",
    "backend",
    "bound",
    "causal_conv1d",
    "choose",
    "expert_feedforward",
    "expert_linear",
    "fuses_mamba_step",
    "fuses_moe_step",
    "linear",
    "linear_add",
    "linear_argmax",
    "linear_beside",
    "linear_cross_entropy",
    "load_kernels",
    "mamba_step",
    "mamba_step_of",
    "moe_step",
    "norm_linear",
    "pack",
    "prepare_experts",
    "prepare_mamba_step",
    "prepare_rms_norm",
    "prepare_router",
    "rms_norm",
    "rotary",
    "router",
    "router_choices",
    "router_means",
    "selective_scan",
    "transformed",
    "unpacked",
    "why_not",
    "why_not_moe_step",
]


class backend:
    """Override the choice of backend: `with ops.backend("reference"): ...`, or a plain call, which lasts.

    In the context that asks (`contextvars`): other threads choose for themselves. What `torch.compile` has compiled
    keeps the choice of the context that compiled it.

    Raises:
        ValueError: the name is none of "reference", "cpu", "triton", "cuda".
        RuntimeError: that backend cannot run on this machine; the message says why and what to do.
    """

    def __init__(self, name: str | None):
        self.previous = force(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        force(self.previous)


# Names of version 0.1, which go with the next: the family whose face holds each, and what takes its place.
_OLD = {
    "grouped_linear": ("experts", "grouped_linear", "ops.expert_linear"),
    "linear_float32": ("router", "linear_float32", "ops.router"),
    "places_in_queues": ("experts", "places_in_queues", "layers.moe.routing.arrival"),
    "route": ("router", "router_choices", "ops.router_choices"),
    "route_with_stats": ("router", "route_with_stats", "ops.router_means"),
    "route_with_totals": ("router", "router", "ops.router"),
}


def __getattr__(name: str) -> Any:
    if name not in _OLD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family, function, instead = _OLD[name]
    message = f"moemamba.ops.{name} will be gone in the next version; use moemamba.{instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(import_module(f"{__name__}.{family}"), function)
