"""MoE-Mamba: selective state-space layers interleaved with sparse mixtures of experts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .counting import count_parameters
from .presets import preset, presets
from .training.config import TrainConfig

if TYPE_CHECKING:
    from . import layers, ops
    from .checkpoint import load, save
    from .inference import generate
    from .model import MoEMamba, Output
    from .state import State
    from .training.evaluate import evaluate
    from .training.loop import train

__version__ = "0.1.0"
__all__ = [
    "MoEMamba",
    "ModelConfig",
    "Output",
    "State",
    "TrainConfig",
    "count_parameters",
    "evaluate",
    "generate",
    "layers",
    "load",
    "ops",
    "preset",
    "presets",
    "save",
    "train",
]

# Everything that needs torch loads on first use, so that the rest answers at once.
_LAZY = {
    "MoEMamba": "model",
    "Output": "model",
    "State": "state",
    "evaluate": "training.evaluate",
    "generate": "inference",
    "layers": "",
    "load": "checkpoint",
    "ops": "",
    "save": "checkpoint",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LAZY[name] or name}", __name__)
    return getattr(module, name) if _LAZY[name] else module
