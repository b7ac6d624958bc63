"""`moemamba train`: a preset first if wanted, then options that change it."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..reading import read_config
from ..training.config import TrainConfig
from ..training.stop import Interrupted
from .info import find_config
from .terminal import parse, stopped


@dataclass(frozen=True)
class Train:
    """Train a model: a PRESET, or a config.json, changed by the options."""

    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run", default=default.run)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--auto-resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    if known.resume or known.auto_resume:
        default = begun(Path(known.run)) or default
    return parse(Train, arguments, "train [PRESET]", Train(default))


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
        print(f"\n{interrupted}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            stopped(Path(asked.config.run), f"moemamba train --run {shlex.quote(asked.config.run)} --resume")
        raise
