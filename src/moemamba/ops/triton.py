"""The ops that have kernels in Triton, one file a family."""

from .triton_conv import causal_conv1d
from .triton_scan import selective_scan

__all__ = ["causal_conv1d", "selective_scan"]
