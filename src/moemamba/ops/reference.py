"""All ops in plain PyTorch: what they mean."""

from .conv.reference import causal_conv1d
from .dense.reference import linear, linear_beside, rms_norm
from .experts.reference import ACTIVATIONS, dispatch, expert_feedforward, expert_linear, grouped_linear
from .head.reference import linear_argmax, linear_cross_entropy
from .mamba_step.reference import mamba_step
from .router.reference import linear_float32, places_in_queues, route, route_with_stats, route_with_totals
from .scan.reference import selective_scan

__all__ = [
    "ACTIVATIONS",
    "causal_conv1d",
    "dispatch",
    "expert_feedforward",
    "expert_linear",
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
]
