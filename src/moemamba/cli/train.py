"""`moemamba train`: a preset first if wanted, then options that change it."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..host.files import expanded
from ..host.terminal import say
from ..reading import read_config
from ..training.config import GROUPS, TrainConfig
from ..training.stop import Interrupted
from .info import find_config
from .options import Merged
from .terminal import parse, stopped


@dataclass(frozen=True)
class Train:
    """Train a model: a PRESET, or a config.json, changed by the options. Without either, a small MoE-Mamba on Python's
    own standard library."""

    config: Merged[TrainConfig] = field(default_factory=TrainConfig)
    resume: bool = False
    """continue the run in --run from its newest checkpoint, exactly as if it had never stopped; the run's own options
    need not be given again"""
    auto_resume: bool = False
    """continue the run in --run if it has begun, and begin it otherwise: for schedulers and torchrun, which start the
    same command again"""


def read(arguments: Sequence[str]) -> Train:
    """What is asked for. The preset, or the run to resume, gives the options' defaults."""
    default = TrainConfig()
    if arguments and not arguments[0].startswith("-"):
        source, *arguments = arguments
        default = replace(default, model=find_config(source), run=f"runs/{Path(source).stem}")
    if {"--resume", "--auto-resume", "--auto_resume"} & set(arguments):
        run = _given(arguments, "--run") or default.run
        default = begun(expanded(run)) or default
    return parse(Train, arguments, "train [PRESET]", Train(default), GROUPS)


def _given(arguments: Sequence[str], option: str) -> str | None:
    """What an option is set to, before the others can be read; the last time counts."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def begun(run: Path) -> TrainConfig | None:
    """How the run in a directory was begun; None if there is none."""
    file = run / "train.json"
    return read_config(TrainConfig, file) if file.is_file() else None


def main(arguments: Sequence[str]) -> None:
    asked = read(arguments)
    from ..training.loop import train

    try:
        train(asked.config, "auto" if asked.auto_resume else asked.resume)
    except Interrupted as interrupted:
        say(f"\n{interrupted}")
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            _say_stopped(Path(asked.config.run), shlex.join(["moemamba", "train", *arguments]))
        raise


def _say_stopped(run: Path, command: str) -> None:
    """After Ctrl-C that did not wait for the step to be saved."""
    if (run / "train.json").is_file():
        stopped(run, f"moemamba train --run {shlex.quote(str(run))} --resume")
    else:
        say(f"\nstopped before training began; nothing was written. Begin again with: {command}")
