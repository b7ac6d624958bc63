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
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

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
    from .training.loop import train

    try:
        train(parsed.config, parsed.resume)
    except KeyboardInterrupt:
        _stopped(Path(parsed.config.run), f"moemamba train --run {parsed.config.run} --resume")
        raise


def _begun(arguments: list[str], default: TrainConfig) -> TrainConfig:
    """How the run to resume was begun, if --run names one: then its options need not be given again."""
    where = next((value for option, value in pairwise(arguments) if option == "--run"), default.run)
    file = Path(where) / "train.json"
    return (
        from_dict(TrainConfig, json.loads(file.read_text(encoding="utf-8")), str(file)) if file.is_file() else default
    )


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


@dataclass(frozen=True)
class Eval:
    """Measure how well a run's model predicts a text."""

    run: Positional[str]
    """a run directory or a checkpoint"""
    data: str | None = None
    """text to predict, a file or a folder; the run's own held-out text if None"""
    context: int | None = None
    """tokens in a window; the run's if None"""
    batch_size: int = 16
    tokens: int | None = None
    """predict about that many at most; all if None"""
    device: str = "auto"


def evaluate(arguments: list[str]) -> None:
    """RUN  loss, perplexity and bits per byte of a run's model on a text"""
    parsed = _parse(Eval, arguments, "eval")
    from .checkpoint import load
    from .training.data import cache_directory, prepare
    from .training.evaluate import evaluate

    model, tokenizer = load(parsed.run, _device(parsed.device))
    begun = _run_config(Path(parsed.run))
    source, held_out = (parsed.data, parsed.data) if parsed.data else (begun.data, begun.validation)
    corpus = prepare(source, tokenizer, cache_directory(Path(parsed.run) / "tokens"), held_out)
    found = evaluate(
        model,
        corpus.validation,
        context=parsed.context or begun.context,
        batch_size=parsed.batch_size,
        most=parsed.tokens,
        reset_state=begun.reset_state,
        drop_gap=any(experts.capacity_factor for experts in model.config.routers),
    )
    rows = [
        ("text", parsed.data or f"held-out part of {corpus.name}", f"{found.tokens:,} tokens"),
        ("loss", f"{found.loss:.4f}", "nats a token"),
        ("perplexity", f"{found.perplexity:.3f}", ""),
        ("bits per byte", f"{found.bits_per_byte:.4f}", "comparable between tokenizers"),
    ]
    if found.drop_gap is not None:
        rows.append(
            ("drop gap", f"{found.drop_gap:+.4f}", "what the capacity limits of training would add to the loss")
        )
    show((), rows)


@dataclass(frozen=True)
class Info:
    """Layers, parameters, operations and memory of a model, without building it."""

    model: Positional[str]
    """a preset, a run directory or a config.json"""
    context: int = 1024


def info(arguments: list[str]) -> None:
    """PRESET | RUN | config.json  layers, parameters, operations, memory"""
    parsed = _parse(Info, arguments, "info")
    config = find_config(parsed.model)
    print(f"{config.pattern} × {config.n_blocks}, d_model {config.d_model}\n")
    show(LAYERS, layers(config))
    print()
    show((), costs(config, parsed.context))


@dataclass(frozen=True)
class Doctor:
    """Versions, devices, and which backend each op uses and why."""


def doctor(arguments: list[str]) -> None:
    """versions, devices, and which backend each op uses and why"""
    _parse(Doctor, arguments, "doctor")
    from .doctor import BACKENDS, backends, versions

    show((), versions())
    print()
    show(BACKENDS, backends())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "compare": compare,
    "generate": generate,
    "eval": evaluate,
    "info": info,
    "doctor": doctor,
}


def main() -> None:
    """Run the command of `sys.argv` and exit: 0 done, 1 failed, 2 asked for the impossible, 130 interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("MOEMAMBA_DEBUG") == "1"
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, ArithmeticError) as error:
        if debug:
            raise
        print(f"moemamba: {_sentence(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ArithmeticError) else 2)


def run(arguments: Sequence[str]) -> None:
    """One command; raises what it raises, and SystemExit for help and unknown options."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        COMMANDS[name](rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        known = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no command {name!r}; {known}")


def show(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: ruled on a terminal, plain columns elsewhere. The first column and wordy ones lie left."""
    rows = list(rows)
    if sys.stdout.isatty():
        table = Table(box=box.SIMPLE_HEAD, show_header=bool(header), pad_edge=False)
        for index, column in enumerate(zip(*rows, strict=True)):
            table.add_column(header[index] if header else "", justify="right" if _figures(column) else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _figures(column: Sequence[str]) -> bool:
    """Whether a column holds numbers, which stand under each other."""
    return all(cell[:1] in "0123456789<>−+–×" for cell in column)


def _parse(kind: type[Arguments], arguments: list[str], command: str, default: Arguments | None = None) -> Arguments:
    """The dataclass of a command from its arguments; leaves with status 2, saying why, if they do not fit."""
    options = (FlagCreatePairsOff,)
    if default is None:
        return tyro.cli(kind, args=arguments, prog=f"moemamba {command}", config=options)
    return tyro.cli(kind, args=arguments, prog=f"moemamba {command}", config=options, default=default)


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:{width}}{command.__doc__}" for name, command in COMMANDS.items())
    return (
        f"usage: moemamba COMMAND [options]\n\n{lines}\n\nmoemamba COMMAND --help says more about one.\n"
        f"presets: {', '.join(presets())}"
    )


def _sentence(error: Exception) -> str:
    """What an error says, without the system's error number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _run_config(path: Path) -> TrainConfig:
    """How the run was trained that a run directory or checkpoint belongs to; the defaults if unknown."""
    for folder in (path, path.parent.parent):
        if (file := folder / "train.json").is_file():
            return from_dict(TrainConfig, json.loads(file.read_text(encoding="utf-8")), str(file))
    return TrainConfig()


def _device(name: str) -> str:
    import torch

    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _stopped(place: Path, command: str) -> None:
    """Say what an interruption leaves behind."""
    saved = sorted(place.rglob("checkpoints/[0-9]*"))
    what = f"{saved[-1]} is saved" if saved else "nothing was saved yet"
    print(f"\nstopped; {what}. Go on with: {command}", file=sys.stderr)
