"""The ops that have kernels in Triton, one file a family."""

from .conv.triton import causal_conv1d
from .dense.triton import linear_beside
from .experts.triton import expert_feedforward
from .experts.triton_linear import expert_linear, grouped_linear
from .experts.triton_sort import places_in_queues
from .head.triton import linear_cross_entropy
from .mamba_step.triton import linear_argmax, mamba_step
from .router.triton import route_with_totals
from .router.triton_few import linear_float32, route
from .scan.triton import selective_scan

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
