"""The race: a fixed held-out quality, on a text that anyone can rebuild, in the least time on one GPU: docs/race.md."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...counting import count_parameters
from ...host.files import expanded, write_json
from ...marks import marks
from ...reading import to_dict
from ...training.config import TrainConfig, read_run
from ..compare import Contender, parse_contender
from ..page import count
from ..results import read_history

TARGET = 1.0  # bits per byte of the held-out package, dropless
EVALUATED = 1 << 20  # tokens of it that each evaluation reads, spread over all of it
FILES = {"data": "train.jsonl.gz", "validation": "validation.jsonl.gz", "test": "test.jsonl.gz"}

# What the rules fix, or what is no entry's to choose.
FIXED = {"model", "data", "validation", "test", "run", "start", "branch", "seed", "data_seed", "eval_tokens", "device"}
OWN = set(marks(TrainConfig)) - FIXED


@dataclass(frozen=True)
class Record:
    """What an entry came to with one seed."""

    entry: str
    seed: int
    command: str
    device: str
    version: str
    target: float
    """bits per byte"""
    seconds: float | None
    """from the first step to the end of the evaluation that first had the target; None if none had"""
    step: int | None
    tokens: int | None
    """trained on by then"""
    best: float
    """lowest bits per byte of the run"""
    test: float | None
    """bits per byte of the test package at the end of the run, all of it"""
    held_out_bytes: int | None
    """of text, by which anyone sees that the corpus is the same"""
    parameters: int
    active: int
    curve: tuple[tuple[float, float], ...]
    """(seconds, bits per byte) of every evaluation"""
    config: dict[str, Any]
    """of the run, as train.json has it"""


def corpus(folder: str) -> dict[str, str]:
    """The texts of a corpus that benchmarks/corpus.py has built, by the options that name them.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    found = {name: expanded(folder) / file for name, file in FILES.items()}
    if missing := [path for path in found.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]} is missing; the race is on the corpus that benchmarks/corpus.py builds: python "
            f"benchmarks/corpus.py {folder}"
        )
    return {name: str(path) for name, path in found.items()}


def entry(text: str) -> Contender:
    """`fast=moe-mamba-25m,learning_rate=0.002,batch_size=256,steps=6000`: a model and any recipe.

    Raises:
        ValueError: a change that there is not, or that the rules fix.
    """
    return parse_contender(text, OWN)


def configured(contender: Contender, base: TrainConfig, seed: int, out: Path) -> TrainConfig:
    """The run of an entry; the rules' part of it is that of `base`."""
    run = str(out / contender.name / f"seed-{seed}")
    fixed = {"model": contender.model, "run": run, "seed": seed, "data_seed": seed, "eval_tokens": EVALUATED}
    return dataclasses.replace(base, **{**contender.recipe, **fixed})


def judged(run: Path, name: str, command: str, device: str, version: str, target: float = TARGET) -> Record:
    """What a run came to, from its train.json and metrics.jsonl alone.

    Raises:
        ValueError: it has no evaluation with bits per byte, or is damaged.
        OSError: it is not there.
    """
    config, history = read_run(run / "train.json"), read_history(run)
    lines = [line for line in history.evaluation if {"seconds", "bits_per_byte", "tokens"} <= line.keys()]
    if not lines:
        raise ValueError(f"{run} has no evaluation with bits per byte; a race is run by them")
    first = next((line for line in lines if line["bits_per_byte"] <= target), None)
    test = next((line.get("bits_per_byte") for line in reversed(history.test)), None)
    held_out = next((int(size) for _, size in history.curve("data", "held_out_bytes")), None)
    sizes = count_parameters(config.model)
    return Record(
        entry=name,
        seed=config.seed,
        command=command,
        device=device,
        version=version,
        target=target,
        seconds=first["seconds"] if first else None,
        step=first["step"] if first else None,
        tokens=first["tokens"] if first else None,
        best=min(line["bits_per_byte"] for line in lines),
        test=test,
        held_out_bytes=held_out,
        parameters=sizes.total,
        active=sizes.active,
        curve=tuple((line["seconds"], round(line["bits_per_byte"], 6)) for line in lines),
        config=to_dict(config),
    )


def write_record(record: Record, file: Path) -> None:
    """As JSON, for docs/results/race."""
    write_json(file, dataclasses.asdict(record))


HEADER = ("entry", "seed", "time", "steps", "tokens", "best", "test", "parameters, active", "GPU")


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The table of records, the fastest first; those that never had the target last."""
    order = sorted(records, key=lambda each: (each.seconds is None, each.seconds or each.best))
    return [
        (
            each.entry,
            f"{each.seed}",
            "never" if each.seconds is None else clock(each.seconds),
            "–" if each.step is None else f"{each.step:,}",
            "–" if each.tokens is None else count(each.tokens),
            f"{each.best:.4f}",
            "–" if each.test is None else f"{each.test:.4f}",
            f"{count(each.parameters)}, {count(each.active)}",
            each.device,
        )
        for each in order
    ]


def clock(seconds: float) -> str:
    """75.25 -> `1:15.2`."""
    tenths = int(10 * seconds)  # never shown shorter than it was by rounding to the minute
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def markdown_row(row: Sequence[str]) -> str:
    """A line for docs/race.md."""
    return f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in row)} |"
