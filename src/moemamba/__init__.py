"""MoE-Mamba: selective state-space layers interleaved with sparse mixtures of experts.

`docs/library.md` shows what can be done from Python. `dir(moemamba)` is all that is public here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, ModelConfig, RoutedMambaConfig
from .counting import count_parameters
from .presets import preset, presets
from .training.config import TrainConfig

if TYPE_CHECKING:
    from . import layers, ops
    from .checkpoint import CheckpointError, load, save
    from .data.batches import Tokens
    from .data.handed import prepare
    from .data.prepared import Corpus
    from .host.progress import Report
    from .host.stop import Interrupted
    from .inference import generate
    from .inspection import Look, look
    from .layers import RouterStats
    from .model import MoEMamba, Output
    from .state import State
    from .text import ByteTokenizer, Tokenizer
    from .training.evaluate import Evaluation, evaluate
    from .training.loop import TrainResult, train
    from .training.update import Diverged, make_optimizer
    from .training.watch import Moment

__version__ = "0.1.0"
__all__ = [
    "AttentionConfig",
    "ByteTokenizer",
    "CheckpointError",
    "Corpus",
    "Diverged",
    "Evaluation",
    "ExpertsConfig",
    "FeedForwardConfig",
    "Interrupted",
    "Look",
    "MambaConfig",
    "MoEMamba",
    "ModelConfig",
    "Moment",
    "Output",
    "Report",
    "RoutedMambaConfig",
    "RouterStats",
    "State",
    "Tokenizer",
    "Tokens",
    "TrainConfig",
    "TrainResult",
    "count_parameters",
    "evaluate",
    "generate",
    "layers",
    "load",
    "look",
    "make_optimizer",
    "ops",
    "prepare",
    "preset",
    "presets",
    "save",
    "train",
]

# Everything that needs torch, or takes its time, loads on first use, so that the rest answers at once.
_LAZY = {
    "ByteTokenizer": "text",
    "CheckpointError": "checkpoint",
    "Corpus": "data.prepared",
    "Diverged": "training.update",
    "Evaluation": "training.evaluate",
    "Interrupted": "host.stop",
    "Look": "inspection",
    "MoEMamba": "model",
    "Moment": "training.watch",
    "Output": "model",
    "Report": "host.progress",
    "RouterStats": "layers",
    "State": "state",
    "Tokenizer": "text",
    "Tokens": "data.batches",
    "TrainResult": "training.loop",
    "evaluate": "training.evaluate",
    "generate": "inference",
    "layers": "",
    "load": "checkpoint",
    "look": "inspection",
    "make_optimizer": "training.update",
    "ops": "",
    "prepare": "data.handed",
    "save": "checkpoint",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LAZY[name] or name}", __name__)
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
