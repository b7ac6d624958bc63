"""What a model makes of contexts longer than those it was trained on: loss and routing by position, and recall."""

from .positions import Bin, ByPosition, Load, by_position
from .recall import TASKS, Recalled, recall

__all__ = ["TASKS", "Bin", "ByPosition", "Load", "Recalled", "by_position", "recall"]
