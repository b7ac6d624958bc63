"""Generation from a trained model. Never imports training."""

from typing import TYPE_CHECKING, Any

from .config import Sampling

if TYPE_CHECKING:
    from .generate import generate, stream

__all__ = ["Sampling", "generate", "stream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import generate as module  # needs torch, which Sampling does not

    return getattr(module, name)
