"""The ops that have kernels for the CPU, one file a family."""

from .cpu_conv import causal_conv1d
from .cpu_cross_entropy import linear_cross_entropy
from .cpu_experts import expert_feedforward, expert_linear, grouped_linear
from .cpu_linear import linear
from .cpu_norm import rms_norm
from .cpu_route import route_with_stats
from .cpu_scan import selective_scan
from .cpu_step import mamba_step

__all__ = [
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
]
