"""The directory of a training run: configuration, metrics, and checkpoints that resume exactly."""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import TOKENIZER_LIMIT, CheckpointError, Damaged, checkpoints, damaged, read_json, write_model
from ...distributed.processes import Processes
from ...host.files import (
    FileError,
    WriteError,
    check_regular,
    expanded,
    new_directory,
    replace,
    replacing,
    write_json,
    writing,
)
from ...host.lock import Lock
from ...model import MoEMamba
from ...reading import from_dict, read_config, shown, to_dict, validate
from ...tensors import write_tensors
from ...text import Tokenizer, load_tokenizer
from ..config import TrainConfig
from ..evaluate import Evaluation
from ..update.guard import Skips
from ..watch.alarms import Raised
from ..watch.tensorboard import TensorBoard
from .saving import TRAINING, Snapshot, examine, read_parts

# What may differ between a run and its resumption: nothing that enters the weights, but for what helps a failed run on.
FREE = {"data", "validation", "tokenizer", "run", "device", "log_every", "eval_every", "eval_tokens", "save_every"}
FREE |= {"keep", "recompute", "compile", "cuda_graph", "tensorboard", "on_failure", "max_skips", "spike_factor"}
FREE |= {"shard", "expert_parallel", "accumulate", "timeout"}
FREE |= {"steps"}  # more of them are a change that `origin.go_on_longer` records

POSITION_LIMIT = 1 << 26
"""bytes of a training.json, which counts the steps that each of thousands of experts had no token"""
LINE_LIMIT = 1 << 26
"""bytes of a line of metrics.jsonl"""
LEFTOVER = r"\.\d{8}(\.\d+)?"
"""how what is being written or removed is called: what a killed process leaves"""


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


class Run:
    """A run directory.

    `config.json`, `train.json`, `tokenizer.json` and `metrics.jsonl` describe the run; `checkpoints/00001000/` holds
    the model after 1,000 steps as `moemamba.load` reads it, with the optimiser (`training.safetensors`) and the
    position (`training.json`).
    """

    def __init__(self, path: str | Path):
        self.path = expanded(path)
        self.metrics = self.path / "metrics.jsonl"
        self.writes = True
        """False in all processes of a run but the first"""
        self.board: TensorBoard | None = None
        """gets every line of metrics.jsonl too"""
        self.lock = Lock(self.path / ".lock")

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "train.json").exists()

    def claim(self, resume: bool) -> None:
        """Check, before any work, that the run can be written here; until `close` no other process can claim it.

        Raises:
            FileExistsError: it holds a run that is not to be resumed, or checkpoints of which nothing else is left.
            FileNotFoundError: it holds no run to resume.
            OSError: it cannot be written, or another process trains in it.
        """
        if self.exists and not resume:
            raise FileExistsError(
                f"{self.path} already holds a run; resume it (--resume), or choose another run directory"
            )
        if not self.exists and checkpoints(self.path):  # newer ones than a new run's first, which would be removed
            raise FileExistsError(
                f"{self.path} holds checkpoints, but not the train.json of their run; restore it, or choose another "
                "run directory"
            )
        if resume and not self.exists:
            raise FileNotFoundError(f"{self.path} holds no run to resume; start one without --resume")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            owner = self.lock.take()
        except OSError as error:
            why = error.reason if isinstance(error, WriteError) else error.strerror
            raise OSError(f"cannot write to the run directory {self.path}: {why}; choose another (--run)") from error
        if owner is not None:
            raise OSError(
                f"another process trains in {self.path}{owner and f' ({owner})'}; wait until it ends, or choose "
                "another run directory (--run)"
            )
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """What a process left that was killed while it saved; nothing else, and never through a link."""
        folder = self.path / "checkpoints"
        if folder.is_symlink() or not folder.is_dir():
            return
        for entry in list(os.scandir(folder)):
            if re.fullmatch(LEFTOVER, entry.name, re.ASCII) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)  # what stays does no harm

    def close(self) -> None:
        """Let other processes claim the run."""
        self.lock.release()

    def begin(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Write what describes the run; train.json comes last, so that with it the rest is there."""
        self._replace("tokenizer.json", tokenizer.to_json())
        self._replace("config.json", json.dumps(to_dict(config.model), indent=2) + "\n")
        self.describe(config)

    def describe(self, config: TrainConfig) -> None:
        """Write train.json, at once or not at all."""
        self._replace("train.json", json.dumps(to_dict(config), indent=2) + "\n")

    def config(self) -> TrainConfig:
        """How the run was begun."""
        return read_config(TrainConfig, self.path / "train.json")

    def tokenizer(self) -> Tokenizer:
        """The run's own; raises CheckpointError."""
        file = self.path / "tokenizer.json"
        try:
            check_regular(file, TOKENIZER_LIMIT)
            return load_tokenizer(self.path)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(f"{file} is missing or damaged; copy it from one of the run's checkpoints") from error

    def check_unchanged(self, config: TrainConfig, besides: frozenset[str] = frozenset()) -> None:
        """Raises ValueError if a field differs that would change the course of the run; those `besides` may."""
        then, now = dict(_flat(to_dict(self.config()))), dict(_flat(to_dict(config)))
        then["routing_groups"] = then["routing_groups"] or then["accumulate"]  # None in runs of older versions
        for name, value in now.items():
            if name.split(".")[0] not in FREE | besides and then.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but the run in {self.path} began with {then.get(name)!r}; "
                    "resume with that value, or begin a new run"
                )

    def holds(self, kind: str, **values: Any) -> bool:
        """Whether metrics.jsonl has this line."""
        line = json.dumps({"kind": kind, **values})
        return self.metrics.exists() and line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()

    def log(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, **values}) + "\n")
        if self.board:
            try:
                self.board.write(kind, values)
            except OSError as error:  # it only shows what is in metrics.jsonl
                self.board = None
                self.log("note", step=values["step"], text=f"TensorBoard's file ends here: {error.strerror or error}")

    def write(self, snapshot: Snapshot, tokenizer: Tokenizer, keep: int) -> None:
        """Write a checkpoint, then remove those that are neither among the newest `keep` nor the best evaluated."""
        folder = self.path / "checkpoints" / f"{snapshot.position['step']:08d}"
        with new_directory(folder) as beside:
            write_model(beside, snapshot.config, snapshot.model, tokenizer)
            write_tensors(beside / TRAINING, snapshot.training)
            write_json(beside / "training.json", snapshot.position)
        self._prune(keep)

    def _prune(self, keep: int) -> None:
        """Remove old checkpoints; nothing where `checkpoints` is a link, since others may keep theirs there."""
        found = checkpoints(self.path)
        if (self.path / "checkpoints").is_symlink():
            return
        losses = {folder: _evaluated_loss(folder) for folder in found}
        best = min(found, key=losses.__getitem__)
        for old in found[:-keep]:
            if (old != best or losses[old] == math.inf) and not old.is_symlink():
                gone = old.with_name(f".{old.name}")
                old.rename(gone)  # at once, so that nobody sees half of it
                shutil.rmtree(gone)

    def restore(
        self,
        model: MoEMamba,
        optimizer: torch.optim.Optimizer,
        content: str,
        notify: Callable[[str], None],
        processes: Processes,
        steps: int | None = None,
    ) -> Position:
        """Load the newest checkpoint that is intact, and forget all that came after it. All processes call this.

        Only the first process says what is damaged: a file that another cannot read is no worse for it.

        Args:
            model, optimizer: sharded in any way; each process reads its own part of the files.
            content: hash of the training tokens, which must be that of the run.
            notify: told about checkpoints that are damaged, which are moved aside.
            steps: of the run; no checkpoint is from after them.
        Returns:
            where the run stands; the beginning if nothing was saved yet.
        Raises:
            CheckpointError: there are checkpoints, but none is intact, or they are of another model.
            ValueError: the training data has changed.
            OSError: this machine cannot read a checkpoint, which may be intact.
        """
        folder, position = processes.once(lambda: self._newest(model, optimizer, notify))
        if folder is None:
            position.content = content
        if position.content != content:
            raise ValueError(
                f"the training data of {self.path} has changed since the run began; resume with the same data"
            )
        if steps is not None and position.step > steps:
            raise ValueError(
                f"{self.path} is at step {position.step:,}, but the run is to have {steps:,}; resume with its own steps"
            )
        if folder is not None:
            self._read(folder, model, optimizer, processes)
        processes.once(lambda: self._forget_after(position.step))
        return position

    def _newest(
        self, model: MoEMamba, optimizer: torch.optim.Optimizer, notify: Callable[[str], None]
    ) -> tuple[Path | None, Position]:
        """The newest checkpoint that is intact, and its position; newer ones are moved aside."""
        found = checkpoints(self.path)
        for folder in reversed(found):
            try:
                position = read_position(folder)
                examine(folder, model, optimizer)
                return folder, position
            except Damaged as error:
                if folder == found[0]:
                    raise
                notify(f"{error}; it is now called {_put_aside(folder).name}")
        return None, Position()

    def _read(self, folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        """Every process's part; where one cannot, all stop, and nothing is moved aside."""
        failed: Exception | None = None
        try:
            read_parts(folder, model, optimizer)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed = error
        if processes.any(failed is not None):
            raise failed or OSError(
                f"{folder} is intact here ({socket.gethostname()}), but another process could not read it; "
                "the run directory must be the same for all machines"
            )

    def _forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that the resumed run will write again, and one that is cut short."""
        if self.metrics.exists():
            check_regular(self.metrics)
            with replacing(self.metrics) as stream:
                stream.writelines(_lines_until(self.metrics, step))

    def _replace(self, name: str, text: str) -> None:
        replace(self.path / name, text)


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


def _put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint; what was set aside before stays."""
    names = (f"damaged-{folder.name}{f'.{number}' if number else ''}" for number in range(1 << 16))
    aside = next(place for name in names if not os.path.lexists(place := folder.with_name(name)))
    return folder.rename(aside)


def _evaluated_loss(checkpoint: Path) -> float:
    """Validation loss of a checkpoint; infinite if it was not evaluated, or does not say it."""
    try:
        position = read_position(checkpoint)
    except (OSError, ValueError):
        return math.inf
    found = position.evaluation
    return found.loss if found is not None and position.evaluated == position.step else math.inf


def _lines_until(file: Path, step: int) -> Iterator[bytes]:
    """The lines of a metrics file up to a step, without one that is cut short or is no event."""
    with file.open("rb") as stream:
        while line := stream.readline(LINE_LIMIT):
            try:
                values = json.loads(line)
                here = values["step"] if isinstance(values, dict) else None
            except (ValueError, KeyError, RecursionError):
                continue
            if type(here) is int and here <= step and line.endswith(b"\n"):
                yield line


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
