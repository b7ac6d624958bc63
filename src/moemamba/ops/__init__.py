"""Pure functions on tensors: the operations that the layers are made of.

Each function here checks its arguments and hands them to a backend: "reference" (plain PyTorch, `reference.py`), "cpu"
(compiled loops, `cpu_*.py`), "triton" (GPU kernels, `triton_*.py`) or "cuda" (`cuda_*`: on NVIDIA GPUs the scan and the
convolution's gradients). All compute the same function with the same gradients. The fastest that can run is chosen
from the tensors; `backend("reference")` overrides the choice. The kernels know the backward pass alone: under
torch.func, and where an argument carries a forward-mode derivative, the choice is the reference, which is right there.

What is not of a sequence, padding or another sequence of its row, never reaches it, forward or backward, be it infinite
or not a number.

Letters, here and everywhere: b batch, l length, t tokens (b times l), d d_model, i d_inner, n d_state, k d_conv or
top_k, r dt_rank, e n_experts, f d_expert, v vocabulary. Upper-case A, B, C, D are only the state-space model's.
"""

from types import TracebackType

from .attention import attention
from .choice import BACKENDS, available, bound, choose, force, why_not
from .conv import causal_conv1d
from .dense import linear, linear_beside, rms_norm
from .derivatives import transformed
from .experts import expert_feedforward, expert_linear, grouped_linear
from .head import linear_argmax, linear_cross_entropy
from .mamba_step import fuses_mamba_step, mamba_step
from .router import linear_float32, places_in_queues, route, route_with_stats, route_with_totals
from .scan import selective_scan

__all__ = [
    "BACKENDS",
    "attention",
    "available",
    "backend",
    "bound",
    "causal_conv1d",
    "choose",
    "expert_feedforward",
    "expert_linear",
    "fuses_mamba_step",
    "grouped_linear",
    "linear",
    "linear_argmax",
    "linear_beside",
    "linear_cross_entropy",
    "linear_float32",
    "mamba_step",
    "places_in_queues",
    "rms_norm",
    "route",
    "route_with_stats",
    "route_with_totals",
    "selective_scan",
    "transformed",
    "why_not",
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
