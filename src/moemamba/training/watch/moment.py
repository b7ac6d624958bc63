"""Whoever looks on while a run goes, from Python."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ...model import MoEMamba


class Moment(NamedTuple):
    """What a watcher gets: a line of metrics.jsonl, and the model at that step."""

    kind: str
    """of the line: "train", "router", "evaluation", "skip", "alarm", "failure", "schedule", "data", "note" """
    step: int
    line: dict[str, Any]
    """as it stands in the file"""
    model: MoEMamba
    """in training; whoever puts it into evaluation mode need not put it back. `generate` may be called with it"""


Watch = Callable[[Moment], bool | None]
"""True ends the run at this step, saved and in good order; see `train`"""


class Watcher:
    """Calls a watcher, and remembers what it asked for."""

    def __init__(self, watch: Watch, model: MoEMamba):
        self.watch, self.model, self.asked = watch, model, False

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        training = self.model.training
        line = json.loads(json.dumps({"kind": kind, **values}))  # as others read it
        asked = self.watch(Moment(kind, values["step"], line, self.model))
        self.model.train(training)
        self.asked = self.asked or asked is True
