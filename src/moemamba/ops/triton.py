"""The ops that have kernels in Triton, one file a family."""

from .triton_conv import causal_conv1d
from .triton_cross_entropy import linear_cross_entropy
from .triton_experts import expert_feedforward
from .triton_experts_linear import expert_linear, grouped_linear
from .triton_linear import linear_beside
from .triton_router import linear_float32, route
from .triton_routing import route_with_totals
from .triton_scan import selective_scan
from .triton_sort import places_in_queues
from .triton_step import linear_argmax, mamba_step

__all__ = [
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
]
