"""MoE-Mamba: selective state-space layers interleaved with sparse mixtures of experts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .counting import count_parameters
from .presets import preset, presets

if TYPE_CHECKING:
    from . import layers, ops
    from .inference import generate
    from .model import MoEMamba, Output
    from .state import State

__version__ = "0.1.0"
__all__ = [
    "MoEMamba",
    "ModelConfig",
    "Output",
    "State",
    "count_parameters",
    "generate",
    "layers",
    "ops",
    "preset",
    "presets",
]

# Everything that needs torch loads on first use, so that the rest answers at once.
_LAZY = {"MoEMamba": "model", "Output": "model", "State": "state", "generate": "inference", "layers": "", "ops": ""}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LAZY[name] or name}", __name__)
    return getattr(module, name) if _LAZY[name] else module
