"""Checkpoints that do not depend on the sharding, written while training goes on.

The first process puts the whole tensors together, one at a time, and writes the files that one process alone would:
they can be loaded, evaluated and resumed anywhere at once, with nothing to convert. That takes memory for the whole
model and its optimiser on the CPU of its machine, 12 bytes a parameter with AdamW. Reading takes a process no more
than its own part.
"""

import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import AVERAGED, checkpoints, model_tensors, write_model
from ...config import ModelConfig
from ...distributed import Processes, gathered, sharded
from ...host.files import new_directory, write_json
from ...model import MoEMamba, foreign_parts
from ...state import State
from ...tensors import write_tensors
from ...text import Tokenizer
from ..update import Average, optimizer_tensors
from .position import evaluated_loss

TRAINING = "training.safetensors"
CARRIED = "carried.safetensors"
"""of a run that carries state: that of every row, which its next batch begins with"""
RANDOM_CPU, RANDOM_CUDA = "random.cpu", "random.cuda"  # in it


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, on the CPU, untouched by what training does next."""

    config: ModelConfig
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    """the optimiser's state and that of the random generators"""
    position: dict[str, Any]
    averaged: dict[str, Tensor] | None = None
    """the model's tensors with averaged weights"""
    parts: dict[str, str] | None = None
    """what of the model moemamba does not build"""


def take(
    model: MoEMamba,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    processes: Processes,
    average: Average | None = None,
) -> Snapshot | None:
    """A snapshot in the first process, None in the others; all call this."""

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            value = gathered(tensor)
            if processes.first:
                kept[name] = value.detach().to("cpu", copy=True).contiguous()
        return kept

    weights, training = copies(model_tensors(model)), copies(optimizer_tensors(model, optimizer))
    averaged = copies(average.model_tensors()) if average else None
    if not processes.first:
        return None
    parts = None if sharded(model) else foreign_parts(model)  # what shares out puts classes of its own around it
    return Snapshot(model.config, weights, training | _random_state(), position, averaged, parts)


class Saver:
    """Writes one snapshot at a time in the background; an error surfaces at the next one, or at `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread, after the one before is done. An exit of the interpreter waits for it too."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error


def _random_state() -> dict[str, Tensor]:
    states = {RANDOM_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[RANDOM_CUDA] = torch.cuda.get_rng_state()
    return states


def write(
    run: Path,
    snapshot: Snapshot,
    tokenizer: Tokenizer,
    keep: int,
    spared: Sequence[int] = (),
    carried: State | None = None,
) -> None:
    """Write a checkpoint of a run, then remove those neither among the newest `keep`, nor the best evaluated, nor of
    a step that is spared."""
    folder = run / "checkpoints" / f"{snapshot.position['step']:08d}"
    with new_directory(folder) as beside:
        write_model(beside, snapshot.config, snapshot.model, tokenizer, snapshot.parts)
        write_tensors(beside / TRAINING, snapshot.training)
        if carried is not None:
            carried.save(beside / CARRIED)
        if snapshot.averaged is not None:
            (beside / AVERAGED).mkdir()
            write_model(beside / AVERAGED, snapshot.config, snapshot.averaged, tokenizer, snapshot.parts)
        write_json(beside / "training.json", snapshot.position)
    _prune(run, keep, spared)


def _prune(run: Path, keep: int, spared: Sequence[int]) -> None:
    """Remove old checkpoints; nothing where `checkpoints` is a link, since others may keep theirs there."""
    found = checkpoints(run)
    if (run / "checkpoints").is_symlink():
        return
    losses = {folder: evaluated_loss(folder) for folder in found}
    best = min(found, key=losses.__getitem__)
    for old in found[:-keep]:
        wanted = (old == best and losses[old] < math.inf) or int(old.name) in spared
        if not wanted and not old.is_symlink():
            gone = old.with_name(f".{old.name}")
            old.rename(gone)  # at once, so that nobody sees half of it
            shutil.rmtree(gone)
