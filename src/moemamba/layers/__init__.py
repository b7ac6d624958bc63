"""The layers, usable alone with explicit arguments.

Sequence mixers (`Mamba`, `RoutedMamba`, `Attention`) are `forward(x, state=None, seq_idx=None)` and return their output
with the state that continues it. `MoE` is `forward(x, seq_idx=None) -> (y, RouterStats)`. What they have in common, and
how a model calls them by their letters, is `Layer`. In `seq_idx` -1 is padding; `padded` and `packed` make it.
"""

from .attention import Attention, AttentionState
from .feedforward import FeedForward
from .layer import Layer
from .mamba import Mamba, MambaState
from .moe import MoE
from .moe.router import Router
from .moe.routing import BaseRouter, Choice, RouterStats, Routing, route, routers
from .norm import final_norm, make_norm
from .pooling import PooledHead, pooled
from .roles import Role, roles
from .routed_mamba import RoutedMamba
from .sequences import packed, padded

__all__ = [
    "LAYERS",
    "Attention",
    "AttentionState",
    "BaseRouter",
    "Choice",
    "FeedForward",
    "Layer",
    "Mamba",
    "MambaState",
    "MoE",
    "PooledHead",
    "Role",
    "RoutedMamba",
    "Router",
    "RouterStats",
    "Routing",
    "final_norm",
    "make_norm",
    "packed",
    "padded",
    "pooled",
    "roles",
    "route",
    "routers",
]

LAYERS: dict[str, type[Layer]] = {
    "M": Mamba,
    "E": MoE,
    "F": FeedForward,
    "A": Attention,
    "R": RoutedMamba,
}
