"""The letters of the pattern: what each means for a configuration, a file a letter. No torch here.

A letter is this, its layer (`layers.LAYERS`), and the field of `ModelConfig` with its options.
"""

from .attention import Attention, AttentionConfig
from .experts import Activation, Experts, ExpertsConfig
from .feedforward import FeedForward, FeedForwardConfig
from .letter import Letter
from .mamba import Mamba, MambaConfig
from .options import Options
from .routed_mamba import Projection, RoutedMamba, RoutedMambaConfig

__all__ = [
    "LETTERS",
    "Activation",
    "AttentionConfig",
    "ExpertsConfig",
    "FeedForwardConfig",
    "Letter",
    "MambaConfig",
    "Options",
    "Projection",
    "RoutedMambaConfig",
]

LETTERS: dict[str, Letter] = {
    "M": Mamba(),
    "E": Experts(),
    "F": FeedForward(),
    "A": Attention(),
    "R": RoutedMamba(),
}
