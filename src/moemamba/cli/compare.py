"""`moemamba compare`: models trained on the same batches over seeds, a table and a report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..experiments.compare import parse_contenders
from ..host.files import expanded
from ..training.config import TrainConfig
from .options import Place, Positional, Shared
from .terminal import parse, stopped


@dataclass(frozen=True)
class Compare:
    """Train several models on the same data in the same order, over seeds; print a table and write a report."""

    models: Positional[tuple[str, ...]]
    """two or more, the baseline first: PRESET, NAME=PRESET or NAME=config.json, each with changes behind commas if
    wanted, as in many=moe-mamba-tiny,n_experts=32,learning_rate=0.002; active=0.93M chooses d_expert for so many active
    parameters; one with steps of its own has a schedule of that length. short=@mamba,steps=500 is a branch of the model
    called mamba, which must have --schedule wsd: its runs, cooled down within 500 steps"""
    seeds: int = 2
    """runs of each model; seed k draws other weights and another order of the data, alike for all models"""
    jobs: int = 1
    """runs trained at once, each with its share of the cores, spread over the GPUs"""
    out: Place = "runs/compare"
    """directory of the runs, results.json and report.html; a comparison that was stopped goes on there"""
    budget: Shared[TrainConfig] = field(default_factory=TrainConfig)


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
