"""The ops that have kernels for the CPU, one file a family."""

from .cpu_conv import causal_conv1d
from .cpu_scan import selective_scan

__all__ = ["causal_conv1d", "selective_scan"]
