"""A run on the disk: its directory, where it begins, where it stands, and what is saved of it."""

from .directory import RunDirectory
from .origin import admit, begin, go_on_longer, plant
from .position import Position, read_position
from .restoring import read_carried, read_model, restore
from .saving import Saver, take, write

__all__ = [
    "Position",
    "RunDirectory",
    "Saver",
    "admit",
    "begin",
    "go_on_longer",
    "plant",
    "read_carried",
    "read_model",
    "read_position",
    "restore",
    "take",
    "write",
]
