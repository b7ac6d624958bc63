"""The layers, usable alone with explicit arguments.

Sequence mixers (`Mamba`, `RoutedMamba`, `Attention`) are `forward(x, state=None, seq_idx=None)` and return their output
with the state that continues it. `MoE` is `forward(x, seq_idx=None) -> (y, RouterStats)`.
"""

from .attention import Attention, AttentionState
from .feedforward import FeedForward
from .mamba import Mamba, MambaState
from .moe import MoE
from .moe.router import Router, RouterStats
from .norm import make_norm
from .routed_mamba import RoutedMamba

__all__ = [
    "Attention",
    "AttentionState",
    "FeedForward",
    "Mamba",
    "MambaState",
    "MoE",
    "RoutedMamba",
    "Router",
    "RouterStats",
    "make_norm",
]
