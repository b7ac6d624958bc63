"""Where a run stands: training.json of a checkpoint."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from ...checkpoint import CheckpointError, damaged, read_json
from ...host.files import FileError
from ...reading import from_dict, shown, validate
from ..evaluate import Evaluation
from ..update import Skips
from ..watch import Raised

POSITION_LIMIT = 1 << 26
"""bytes of a training.json, which counts the steps that each of thousands of experts had no token"""


@dataclass
class Position:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    """optimiser steps done"""
    seconds: float = 0.0
    """of work so far"""
    content: str = ""
    """hash of the training tokens"""
    loss: float | None = None
    """mean training loss of the last steps"""
    evaluation: Evaluation | None = None
    """the last one"""
    evaluated: int | None = None
    """its step"""
    skips: Skips = field(default_factory=Skips)
    """of the updates that were withheld"""
    alarms: Raised = field(default_factory=Raised)
    """about the routers; see `Alarms.state`"""
    planned: int = 0
    """optimiser steps in all when this was saved; 0 in checkpoints of older versions"""
    warmup: int | None = None
    """steps of the warm-up, which a run keeps when it goes on longer; None in checkpoints of older versions"""

    def __post_init__(self) -> None:
        validate(self, not_negative=("step", "seconds", "evaluated"))


def read_position(folder: Path) -> Position:
    """Where a run stood when a checkpoint was saved.

    Raises:
        Damaged: training.json is missing, or does not say it.
        CheckpointError: it says more than this version knows.
        OSError: the system cannot read it.
    """
    file = folder / "training.json"
    values = read_json(file, POSITION_LIMIT)
    if unknown := sorted(values.keys() - {each.name for each in fields(Position)}):
        raise CheckpointError(f"{file} has the unknown key {shown(unknown[0])}; resume with the version that wrote it")
    try:
        position = from_dict(Position, values, "position")
        if not {"step", "seconds", "content"} <= values.keys() or position.step != int(folder.name):
            raise FileError(f"its step is {position.step:,}, not that of its folder")
    except ValueError as error:
        raise damaged(file, error) from error
    return position


def evaluated_loss(checkpoint: Path) -> float:
    """Validation loss of a checkpoint; infinite if it was not evaluated, or does not say it."""
    try:
        position = read_position(checkpoint)
    except (OSError, ValueError):
        return math.inf
    found = position.evaluation
    return found.loss if found is not None and position.evaluated == position.step else math.inf
