"""Generation from a trained model. Never imports training."""

from .config import Sampling
from .generate import generate, stream

__all__ = ["Sampling", "generate", "stream"]
