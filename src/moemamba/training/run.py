"""The directory of a training run: configuration, metrics, and checkpoints that resume exactly."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, checkpoints, damaged, read_json, write_model, write_tensors
from ..host.files import new_directory, write_json
from ..model import MoEMamba
from ..reading import read_config, to_dict
from ..tokenizer import Tokenizer, load_tokenizer
from .config import TrainConfig
from .evaluate import Evaluation
from .guard import Skips
from .processes import Processes
from .saving import Snapshot, read_parts
from .tensorboard import TensorBoard

# What may differ between a run and its resumption: nothing that enters the weights, but for what helps a failed run on.
FREE = {"data", "validation", "tokenizer", "run", "device", "log_every", "eval_every", "eval_tokens", "save_every"}
FREE |= {"keep", "recompute", "compile", "cuda_graph", "tensorboard", "on_failure", "max_skips", "spike_factor"}
FREE |= {"shard", "expert_parallel", "accumulate"}


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
    alarms: dict[str, Any] = field(default_factory=dict)
    """about the routers; see `Alarms.state`"""


class Run:
    """A run directory.

    `config.json`, `train.json`, `tokenizer.json` and `metrics.jsonl` describe the run; `checkpoints/00001000/` holds
    the model after 1,000 steps as `moemamba.load` reads it, with the optimiser (`training.safetensors`) and the
    position (`training.json`).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.writes = True
        """False in all processes of a run but the first"""
        self.board: TensorBoard | None = None
        """gets every line of metrics.jsonl too"""
        self._lock: int | None = None

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
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise OSError(
                f"cannot write to the run directory {self.path}: {error.strerror}; choose another (--run)"
            ) from error
        self._take_lock()
        for leftover in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(leftover)  # of a process that was killed while it saved

    def _take_lock(self) -> None:
        """The system's own lock on the directory, which leaves no file and ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OSError(
                f"another process trains in {self.path}; wait until it ends, or choose another run directory (--run)"
            ) from None
        except OSError:  # a file system without locks
            self.close()

    def close(self) -> None:
        """Let other processes claim the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Write what describes the run; train.json comes last, so that with it the rest is there."""
        self._replace("tokenizer.json", tokenizer.to_json())
        self._replace("config.json", json.dumps(to_dict(config.model), indent=2) + "\n")
        self._replace("train.json", json.dumps(to_dict(config), indent=2) + "\n")

    def config(self) -> TrainConfig:
        """How the run was begun."""
        return read_config(TrainConfig, self.path / "train.json")

    def tokenizer(self) -> Tokenizer:
        """The run's own; raises CheckpointError."""
        try:
            return load_tokenizer(self.path)
        except (OSError, ValueError) as error:
            file = self.path / "tokenizer.json"
            raise CheckpointError(f"{file} is missing or damaged; copy it from one of the run's checkpoints") from error

    def check_unchanged(self, config: TrainConfig) -> None:
        """Raises ValueError if a field differs that would change the course of the run."""
        then, now = dict(_flat(to_dict(self.config()))), dict(_flat(to_dict(config)))
        then["routing_groups"] = then["routing_groups"] or then["accumulate"]  # None in runs of older versions
        for name, value in now.items():
            if name.split(".")[0] not in FREE and then.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but the run in {self.path} began with {then.get(name)!r}; "
                    "resume with that value, or begin a new run"
                )

    def log(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        try:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"kind": kind, **values}) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.metrics}: {error.strerror}; free space, then resume the run") from error
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
            write_tensors(beside / "training.safetensors", snapshot.training)
            write_json(beside / "training.json", snapshot.position)
        found = checkpoints(self.path)
        best = min(found, key=_evaluated_loss)
        for old in found[:-keep]:
            if old != best or _evaluated_loss(old) == math.inf:
                gone = old.rename(old.with_name(f".{old.name}"))  # at once, so that nobody sees half of it
                shutil.rmtree(gone)

    def restore(
        self,
        model: MoEMamba,
        optimizer: torch.optim.Optimizer,
        content: str,
        notify: Callable[[str], None],
        processes: Processes,
    ) -> Position:
        """Load the newest checkpoint that is intact, and forget all that came after it. All processes call this.

        Args:
            model, optimizer: sharded in any way; each process reads its own part of the files.
            content: hash of the training tokens, which must be that of the run.
            notify: told about checkpoints that are damaged, which are moved aside.
        Returns:
            where the run stands; the beginning if nothing was saved yet.
        Raises:
            CheckpointError: there are checkpoints, but none is intact.
            ValueError: the training data has changed.
        """
        position = Position(content=content)
        found = processes.once(lambda: checkpoints(self.path))
        for folder in reversed(found):
            failed = None
            try:
                position = _read(folder, model, optimizer)
            except CheckpointError as error:
                failed = error
            if not processes.any(failed is not None):
                break
            failed = failed or CheckpointError(f"{folder} could not be read by another process")
            if folder == found[0]:
                processes.once(partial(_raise, failed))
            notify(str(failed))
            processes.once(partial(_put_aside, folder))
        if position.content != content:
            raise ValueError(
                f"the training data of {self.path} has changed since the run began; resume with the same data"
            )
        processes.once(lambda: self._forget_after(position.step))
        return position

    def _forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that the resumed run will write again, and one that is cut short."""
        if self.metrics.exists():
            self._replace("metrics.jsonl", "".join(_lines_until(self.metrics, step)))

    def _replace(self, name: str, text: str) -> None:
        beside = self.path / f".{name}"
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self.path / name)


def _read(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer) -> Position:
    values: dict[str, Any] = read_json(folder / "training.json")
    read_parts(folder, model, optimizer)
    try:
        evaluation, skips = values.pop("evaluation"), Skips(**values.pop("skips", {}))
        return Position(**values, evaluation=evaluation and Evaluation(**evaluation), skips=skips)
    except (KeyError, TypeError) as error:
        raise damaged(folder / "training.json", error) from error


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _raise(error: Exception) -> None:
    raise error


def _evaluated_loss(checkpoint: Path) -> float:
    """Validation loss of a checkpoint; infinite if it was not evaluated."""
    try:
        values: dict[str, Any] = read_json(checkpoint / "training.json")
    except CheckpointError:
        return math.inf
    return values["evaluation"]["loss"] if values["evaluated"] == values["step"] else math.inf


def _lines_until(file: Path, step: int) -> Iterator[str]:
    """The lines of a metrics file up to a step, without one that was cut short."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                yield line
        except ValueError:
            continue


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
