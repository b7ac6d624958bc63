"""`moemamba compare`: models trained on the same batches over seeds, a table and a report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from ..config import ModelConfig
from ..experiments.contender import parse_contenders
from ..host.files import expanded
from ..training.config import TrainConfig
from .terminal import parse, stopped


@dataclass(frozen=True)
class Budget(TrainConfig):
    """A training run but for what differs between runs."""

    model: Suppress[ModelConfig] = field(default_factory=ModelConfig)
    run: Suppress[str] = ""
    seed: Suppress[int] = 0
    data_seed: Suppress[int] = 0
    start: Suppress[str | None] = None
    branch: Suppress[str | None] = None


@dataclass(frozen=True)
class Compare:
    """Train several models on the same data in the same order, over seeds; print a table and write a report."""

    models: Positional[tuple[str, ...]]
    """two or more, the baseline first: PRESET, NAME=PRESET or NAME=config.json, each with changes behind commas if
    wanted, as in many=moe-mamba-tiny,n_experts=32,learning_rate=0.002; one with steps of its own has a schedule of that
    length"""
    seeds: int = 2
    jobs: int = 1
    """runs trained at once, each with its share of the cores, spread over the GPUs"""
    out: str = "runs/compare"
    """directory of the runs, results.json and report.html; a comparison that was stopped goes on there"""
    budget: Annotated[Budget, arg(name="")] = field(default_factory=Budget)


def main(arguments: Sequence[str]) -> None:
    asked = parse(Compare, arguments, "compare")
    contenders = parse_contenders(asked.models)
    from ..experiments.compare import compare
    from .outcome import tell

    out, command = expanded(asked.out), shlex.join(["moemamba", "compare", *arguments])
    try:
        found = compare(contenders, asked.budget, asked.seeds, out, jobs=asked.jobs, command=command)
    except KeyboardInterrupt:
        stopped(out, command)
        raise
    tell(found, out)
