"""Generation from a trained model. Never imports training."""

from .config import Sampling
from .generation import generate, stream

__all__ = ["Sampling", "generate", "stream"]
