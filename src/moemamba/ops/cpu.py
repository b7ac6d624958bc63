"""The ops that have kernels for the CPU, one file a family."""

from .conv.cpu import causal_conv1d
from .dense.cpu import linear
from .dense.cpu_norm import rms_norm
from .experts.cpu import expert_feedforward, expert_linear, grouped_linear
from .head.cpu import linear_cross_entropy
from .mamba_step.cpu import mamba_step
from .router.cpu import route_with_stats
from .scan.cpu import selective_scan

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
