"""The command line: `moemamba train`, `compare`, `generate`, `eval`, `info`, `doctor`.

What needs torch is imported by the command that uses it, so that help and mistakes answer at once.
"""

import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagConversionOff, Positional, Suppress, arg

from . import __version__
from .config import ModelConfig, from_dict
from .inference.config import Sampling
from .info import LAYERS, costs, find_config, layers
from .presets import presets
from .training.config import TrainConfig

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Train:
    """Train a model."""

    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """continue the run in --run from its newest checkpoint, exactly as if it had never stopped"""


def train(arguments: list[str]) -> None:
    """[PRESET]  train a model; options change its fields, as --model.experts.n-experts 32"""
    default = TrainConfig()
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        default = replace(default, model=find_config(name), run=f"runs/{Path(name).stem}")
    if "--resume" in arguments:
        default = _begun(arguments, default)
    parsed = _parse(Train, arguments, "train [PRESET]", Train(default))
    from . import training

    try:
        training.train(parsed.config, parsed.resume)
    except KeyboardInterrupt:
        _stopped(Path(parsed.config.run), f"moemamba train --run {parsed.config.run} --resume")
        raise


def _begun(arguments: list[str], default: TrainConfig) -> TrainConfig:
    """How the run to resume was begun, if --run names one: then its options need not be given again."""
    where = next((b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--run"), default.run)
    file = Path(where) / "train.json"
    return from_dict(TrainConfig, json.loads(file.read_text(encoding="utf-8")), str(file)) if file.is_file() else default


@dataclass(frozen=True)
class _Budget(TrainConfig):
    """A training run but for what `compare` sets itself."""

    model: Suppress[ModelConfig] = field(default_factory=ModelConfig)
    run: Suppress[str] = ""
    seed: Suppress[int] = 0
    data_seed: Suppress[int] = 0


@dataclass(frozen=True)
class Compare:
    """Train several models on the same data in the same order, over seeds, and write a report."""

    models: Positional[tuple[str, ...]]
    """the baseline first: PRESET, NAME=PRESET or NAME=config.json, each with changes if wanted:
    many=moe-mamba-tiny,n_experts=32,learning_rate=0.002"""
    seeds: int = 2
    out: str = "runs/compare"
    """directory of the runs, results.json and report.html"""
    budget: Annotated[_Budget, arg(name="")] = field(default_factory=_Budget)


def compare(arguments: list[str]) -> None:
    """MODEL MODEL ...  train models on the same batches over seeds; table and report.html"""
    command = shlex.join(["moemamba", "compare", *arguments])
    parsed = _parse(Compare, arguments, "compare")
    from .experiments.contender import parse_contenders

    contenders = parse_contenders(parsed.models)
    from .experiments.compare import compare
    from .experiments.report import notes
    from .experiments.results import HEADER, cells

    out = Path(parsed.out)
    try:
        found = compare(contenders, parsed.budget, parsed.seeds, out, command=command)
    except KeyboardInterrupt:
        _stopped(out, command)
        raise
    print()
    show(HEADER, cells(found.rows, parsed.budget.steps))
    print(f"\n{notes(parsed.seeds)}\n\n{out / 'report.html'}")


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, printing the text as it comes."""

    run: Positional[str]
    """a run directory or a checkpoint"""
    prompt: str | None = None
    """text to continue; - is standard input, as is nothing at all where that is no terminal"""
    max_new_tokens: int = 400
    sampling: Annotated[Sampling, arg(name="")] = field(default_factory=Sampling)
    seed: int | None = None
    """makes the text repeatable"""
    device: str = "auto"


def generate(arguments: list[str]) -> None:
    """RUN  continue a prompt, printing the text as it comes"""
    parsed = _parse(Generate, arguments, "generate")
    prompt = parsed.prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    from .checkpoint import load
    from .inference import stream
    from .tokenizer import StreamDecoder

    model, tokenizer = load(parsed.run, _device(parsed.device))
    ids = tokenizer.encode(prompt or "") or [tokenizer.end_of_text]
    text = StreamDecoder(tokenizer)
    stop = {tokenizer.end_of_text}
    print(prompt or "", end="", flush=True)
    for (token,) in stream(model, [ids], parsed.max_new_tokens, parsed.sampling, stop=stop, seed=parsed.seed):
        if token is not None:
            print(text.push(token), end="", flush=True)
    print(text.finish())
