"""A run on the disk: its directory, where it begins, where it stands, and what is saved of it."""

from .directory import RunDirectory
from .given import check_given, fingerprint, require_beginning
from .origin import admit, begin, go_on_longer, plant
from .position import Position, read_position
from .restoring import read_carried, read_model, restore
from .saving import Saver, take, write
from .telling import diverged, introduce, log_evaluation, log_routers, skipped_steps

__all__ = [
    "Position",
    "RunDirectory",
    "Saver",
    "admit",
    "begin",
    "check_given",
    "diverged",
    "fingerprint",
    "go_on_longer",
    "introduce",
    "log_evaluation",
    "log_routers",
    "plant",
    "read_carried",
    "read_model",
    "read_position",
    "require_beginning",
    "restore",
    "skipped_steps",
    "take",
    "write",
]
