"""The directory of a training run: who may write in it, and what describes the run."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint import TOKENIZER_LIMIT, CheckpointError, checkpoints
from ...config import description
from ...host.files import WriteError, check_regular, expanded, replace, write_json
from ...host.lock import Lock
from ...marks import Change, changeable
from ...reading import to_dict
from ...text import Tokenizer, load_tokenizer, tokenizer_config
from ..config import TrainConfig, read_run
from .log import Log

LEFTOVER = r"\.\d{8}(\.\d+)?"
"""how what is being written or removed is called: what a killed process leaves"""


class RunDirectory:
    """A run directory.

    `config.json`, `train.json`, `tokenizer.json` and `metrics.jsonl` describe the run; `checkpoints/00001000/` holds
    the model after 1,000 steps as `moemamba.load` reads it, with the optimiser (`training.safetensors`) and the
    position (`training.json`).
    """

    def __init__(self, path: str | Path):
        self.path = expanded(path)
        self.log = Log(self.path / "metrics.jsonl")
        self.lock = Lock(self.path / ".lock")

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "train.json").exists()

    def occupy(self, resume: bool) -> None:
        """Check, before any work, that the run can be written here; until `close` no other process can occupy it.

        Raises:
            FileExistsError: it holds a run that is not to be resumed, or checkpoints of which nothing else is left.
            FileNotFoundError: it holds no run to resume.
            OSError: it cannot be written, or another process trains in it.
        """
        if self.exists and not resume:
            raise FileExistsError(
                f"{self.path} already holds a run; resume it (resume=True), or choose another run directory"
            )
        if not self.exists and checkpoints(self.path):  # newer ones than a new run's first, which would be removed
            raise FileExistsError(
                f"{self.path} holds checkpoints, but not the train.json of their run; restore it, or choose another "
                "run directory"
            )
        if resume and not self.exists:
            raise FileNotFoundError(f"{self.path} holds no run to resume; start one without resume=True")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            owner = self.lock.take()
        except OSError as error:
            why = error.reason if isinstance(error, WriteError) else error.strerror
            raise OSError(
                f"cannot write to the run directory {self.path}: {why}; choose another run directory"
            ) from error
        if owner is not None:
            raise OSError(
                f"another process trains in {self.path}{owner and f' ({owner})'}; wait until it ends, or choose "
                "another run directory"
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
        """Let other processes occupy it."""
        self.lock.release()

    def begin(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Write what describes the run; train.json comes last, so that with it the rest is there."""
        replace(self.path / "tokenizer.json", tokenizer.to_json())
        write_json(self.path / "tokenizer_config.json", tokenizer_config(tokenizer))
        write_json(self.path / "config.json", description(config.model, tokenizer.end_of_text))
        self.describe(config)

    def describe(self, config: TrainConfig) -> None:
        """Write train.json, at once or not at all."""
        write_json(self.path / "train.json", to_dict(config))

    def config(self) -> TrainConfig:
        """How the run was begun."""
        return read_run(self.path / "train.json")

    def tokenizer(self) -> Tokenizer:
        """The run's own; raises CheckpointError."""
        file = self.path / "tokenizer.json"
        try:
            check_regular(file, TOKENIZER_LIMIT)
            return load_tokenizer(self.path)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(f"{file} is missing or damaged; copy it from one of the run's checkpoints") from error

    def check_unchanged(self, config: TrainConfig, where: Change = "on resume") -> None:
        """Raises ValueError if an option differs that must not there: it would change the course of the run."""
        then, now = dict(_flat(asdict(self.config()))), dict(_flat(asdict(config)))
        then["routing_groups"] = then["routing_groups"] or then["accumulate"]  # None in runs of older versions
        free = changeable(TrainConfig, where)
        for name in now | then:  # entries of a table, such as `rates`, may be gone
            if name.split(".")[0] not in free and then.get(name) != now.get(name):
                raise ValueError(
                    f"{name} is {now.get(name)!r}, but the run in {self.path} began with {then.get(name)!r}; "
                    "resume with that value, or begin a new run"
                )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
