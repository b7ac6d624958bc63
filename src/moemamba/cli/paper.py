"""`moemamba paper`: a table of the MoE-Mamba paper, run again at a size of one's choice."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..experiments.paper import SCALES, TABLES
from ..host.files import expanded
from ..training.config import TrainConfig
from .options import Place, Positional
from .terminal import parse, stopped

Name = Literal[
    "main", "main-100m", "experts", "parallel", "inner", "inner-all", "ratio", "mlp", "accuracy", "plus", "race"
]


@dataclass(frozen=True)
class Paper:
    """Run a table of the MoE-Mamba paper again: tune the learning rate of every model alike, train all of them on the
    same batches, and hold the outcome against the paper's numbers and claims."""

    table: Positional[Name]
    """main and main-100m (table 1), experts (table 4), parallel (table 7), inner and inner-all (table 3), ratio (table
    2, figure 5), mlp (the first version), accuracy (section 4.6), plus (our improved recipe against a baseline improved
    alike); race (docs/race.md): a fixed held-out quality in the least time on one GPU, by --entry, on the corpus in
    --data"""
    scale: Literal["laptop", "gpu", "paper"] = "laptop"
    """laptop: minutes to an hour on a CPU; gpu: minutes a model; paper: its own 25M models and budget"""
    data: Place | tuple[Place, ...] | None = None
    """texts to train on, as --data of `moemamba train` takes them; the paper's is C4. Python's own standard library if
    None"""
    validation: Place | None = None
    """held-out text, as --validation of `moemamba train` takes it; a part of the data if None"""
    test: Place | None = None
    """text on which finished models are reported, as --test of `moemamba train` takes it; if None, the half of the
    held-out text that learning rates are not chosen by"""
    tokenizer: Place | None = None
    """as --tokenizer of `moemamba train` takes it; the paper's is GPT-2's. bytes if None"""
    steps: int | None = None
    """optimiser steps of each run; the scale's if None"""
    seeds: int | None = None
    """runs of each model, each with a seed of its own; the scale's if None"""
    learning_rates: tuple[float, ...] | None = None
    """learning rates to try for every model, or a single one to take as it is; the scale's if None"""
    tuning_steps: int | None = None
    """optimiser steps of each run that tries a learning rate; the scale's if None"""
    eval_tokens: int = 131072
    """validation tokens that an evaluation reads at most"""
    test_tokens: int | None = None
    """tokens that the test of a finished run reads at most; all if None"""
    jobs: int = 1
    """runs trained at once, spread over the GPUs"""
    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    compile: bool = False
    """torch.compile every layer"""
    entry: tuple[str, ...] | None = None
    """with race: models with any recipe, as moemamba compare names them, here with batch_size, context and so on too:
    fast=moe-mamba-25m,learning_rate=0.002,batch_size=256,steps=6000"""
    out: Place | None = None
    """directory of runs, results.md, results.json and report.html; runs/paper-TABLE-SCALE if None"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Paper, arguments, "paper")
    if asked.table == "race":
        from .race import race

        race(asked, shlex.join(["moemamba", "paper", *arguments]))
        return
    if asked.entry:
        raise ValueError(f"--entry goes with race alone; {asked.table} has entries of its own")
    given = {name: getattr(asked, name) for name in ("steps", "seeds", "tuning_steps")}
    scale = dataclasses.replace(SCALES[asked.scale], **{k: v for k, v in given.items() if v is not None})
    table = TABLES[asked.table]
    if asked.learning_rates:
        entries = tuple(dataclasses.replace(entry, learning_rates=asked.learning_rates) for entry in table.entries)
        table = dataclasses.replace(table, entries=entries)
    base = TrainConfig(
        data=asked.data,
        validation=asked.validation,
        test=asked.test,
        tokenizer=asked.tokenizer or "bytes",
        eval_tokens=asked.eval_tokens,
        test_tokens=asked.test_tokens,
        device=asked.device,
        compile=asked.compile,
    )
    from ..experiments.paper import plan, reproduce
    from .outcome import tell

    out = expanded(asked.out or f"runs/paper-{asked.table}-{asked.scale}")
    command = shlex.join(["moemamba", "paper", *arguments])
    print("\n".join(plan(table, scale)), end="\n\n", flush=True)
    try:
        found = reproduce(table, scale, base, out, jobs=asked.jobs, command=command)
    except KeyboardInterrupt:
        stopped(out, command)
        raise
    tell(found, out)
