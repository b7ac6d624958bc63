"""One model over several processes. It knows models, not how they are trained."""

from .agreement import Agreement
from .processes import Processes, join, sources
from .sequences import sharing, split_sequences, splitting
from .sharding import (
    divide_gradients,
    fill,
    gathered,
    gradient_norm,
    group_routers,
    last_part,
    own_part,
    refresh,
    shard,
    sharded,
    summing,
)

__all__ = [
    "Agreement",
    "Processes",
    "divide_gradients",
    "fill",
    "gathered",
    "gradient_norm",
    "group_routers",
    "join",
    "last_part",
    "own_part",
    "refresh",
    "shard",
    "sharded",
    "sharing",
    "sources",
    "split_sequences",
    "splitting",
    "summing",
]
