"""`moemamba train`: a preset first if wanted, then options that change it."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..host.files import expanded
from ..host.stop import Interrupted
from ..host.terminal import say
from ..marks import option
from ..text import ByteTokenizer, load_tokenizer
from ..training.config import FIRST, TrainConfig, read_run
from .info import find_config
from .options import Merged
from .terminal import parse, stopped


@dataclass(frozen=True)
class Train:
    """Train a model: a PRESET, or a config.json, changed by the options. Without either, a small MoE-Mamba on Python's
    own standard library."""

    config: Merged[TrainConfig] = field(default_factory=TrainConfig)
    resume: bool = option(False, FIRST, place=1)
    """continue the run in --run from its newest checkpoint, exactly as if it had never stopped; the run's own options
    need not be given again. With more --steps it goes on longer, and says what becomes of the learning rate"""
    auto_resume: bool = option(False, FIRST, place=1)
    """continue the run in --run if it has begun, and begin it otherwise: for schedulers and torchrun, which start the
    same command again"""


def read(arguments: Sequence[str]) -> Train:
    """What is asked for. The preset, or the run to resume, to branch from or to start from, gives the defaults."""
    default = TrainConfig()
    named = bool(arguments) and not arguments[0].startswith("-")
    if named:
        source, *arguments = arguments
        default = replace(default, model=find_config(source), run=f"runs/{Path(source).stem}")
    start, branch, resumed = _given(arguments, "--start"), _given(arguments, "--branch"), None
    if {"--resume", "--auto-resume", "--auto_resume"} & set(arguments):
        resumed = begun(expanded(_given(arguments, "--run") or default.run))
    if resumed:
        default = resumed
    elif branch:
        default = branched(branch, _given(arguments, "--steps")) or default
    elif start:
        default = started(default, start, named)
    asked = parse(Train, arguments, "train [PRESET]", Train(default))
    asked.config.model.check_used(default.model)
    return asked


def _given(arguments: Sequence[str], option: str) -> str | None:
    """What an option is set to, before the others can be read; the last time counts."""
    found = None
    for word, following in zip(arguments, (*arguments[1:], None), strict=False):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def started(default: TrainConfig, place: str, named: bool) -> TrainConfig:
    """Defaults of a run that starts from weights: their tokenizer and, where no preset is named, their architecture."""
    folder = newest(place)
    if not (folder / "tokenizer.json").is_file():
        return default  # what is wrong is said where the weights are read
    if not named:
        default = replace(default, model=find_config(str(folder)))
    own = load_tokenizer(folder)
    return default if isinstance(own, ByteTokenizer) else replace(default, tokenizer=str(folder))


def branched(place: str, steps: str | None) -> TrainConfig | None:
    """Defaults of a branch: all that the run that it leaves has; under wsd the rest of the steps is its cool-down."""
    folder = newest(place)
    config = begun(folder.parent.parent)
    if config is None or not folder.name.isdigit():
        return None  # what is wrong is said where the run begins
    config = replace(config, start=None, branch=place)
    every, done = int(steps) if steps and steps.isdigit() else config.steps, int(folder.name)
    return replace(config, cooldown=(every - done) / every) if every > done else config


def newest(place: str) -> Path:
    """A checkpoint, or the newest one of a run. No torch here, so that options are answered at once."""
    folder = expanded(place)
    found = sorted(path for path in (folder / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    return found[-1] if found else folder


def begun(run: Path) -> TrainConfig | None:
    """How the run in a directory was begun; None if there is none."""
    file = run / "train.json"
    return read_run(file) if file.is_file() else None


def main(arguments: Sequence[str]) -> None:
    asked = read(arguments)
    from ..training.loop import train

    try:
        train(asked.config, "auto" if asked.auto_resume else asked.resume)
    except Interrupted as interrupted:
        place = shlex.quote(asked.config.run)
        on = f"Go on with: moemamba train --run {place} --resume"
        say(f"\n{interrupted}".replace("Go on with resume=True", on))
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
