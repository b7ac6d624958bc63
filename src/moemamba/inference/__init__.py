"""Generation from a trained model. Never imports training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Sampling, SamplingOptions
from .request import Event, Reading, Request, Score

if TYPE_CHECKING:
    from .cache import Snapshot, StateCache
    from .engine import Engine
    from .generation import generate, stream

_LATER = {
    "Engine": "engine",
    "Snapshot": "cache",
    "StateCache": "cache",
    "generate": "generation",
    "stream": "generation",
}

__all__ = [
    "Engine",
    "Event",
    "Reading",
    "Request",
    "Sampling",
    "SamplingOptions",
    "Score",
    "Snapshot",
    "StateCache",
    "generate",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Generation needs torch, which `Sampling` does not: it loads on first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
