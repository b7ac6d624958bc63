"""Generation from a trained model, and a look inside one. Never imports training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Sampling, SamplingOptions

if TYPE_CHECKING:
    from .engine import Engine, Event, Request
    from .generation import generate, stream

__all__ = ["Engine", "Event", "Request", "Sampling", "SamplingOptions", "generate", "stream"]


def __getattr__(name: str) -> Any:
    """Generation needs torch, which `Sampling` does not: it loads on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".generation" if name in ("generate", "stream") else ".engine", __name__), name)
