"""Several models, the same data in the same order and the same budget, over seeds."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import from_dict, to_dict
from ..training import train
from ..training.config import TrainConfig
from .contender import RECIPE, Contender
from .history import read_history
from .report import report
from .results import Comparison, Run, summarise

# What differs from run to run, or only says how a run is carried out.
_OWN = {"model", "run", "seed", "data_seed", "device", "compile", "recompute", "save_every", "keep"}


def compare(
    contenders: Sequence[Contender],
    base: TrainConfig,
    seeds: int,
    out: Path,
    *,
    command: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train every contender with every seed, and write `results.json` and `report.html`.

    A seed changes the initial weights and the order of the data; with one seed all models see the same batches. Each run is a
    run directory, `out/NAME/seed-N`: a comparison that was stopped goes on where it stood, and one that is finished only
    writes its report again.

    Args:
        contenders: the first is the baseline.
        base: data, budget and recipe of all of them; its `model`, `run`, `seed` and `data_seed` do not matter.
        out: directory of everything.
        command: what was typed, for the report.
        announce: is told what comes next.
    Raises:
        ValueError: `out` holds runs of another comparison, or anything that `train` raises.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be 1 or more")
    plan = [(contender, seed) for seed in range(seeds) for contender in contenders]
    runs = []
    for number, (contender, seed) in enumerate(plan, start=1):
        config = _config(contender, base, seed, out)
        announce(f"run {number} of {len(plan)}: {contender.name}, seed {seed}, in {config.run}")
        _run(config)
        runs.append(Run(contender.name, seed, Path(config.run), read_history(Path(config.run))))
    rows = summarise(runs, {contender.name: contender.model for contender in contenders}, base.context)
    comparison = Comparison(rows, runs, _settings(base), _environment(), command)
    (out / "results.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(report(comparison), encoding="utf-8")
    return comparison


def _config(contender: Contender, base: TrainConfig, seed: int, out: Path) -> TrainConfig:
    run = str(out / contender.name / f"seed-{seed}")
    return dataclasses.replace(
        base, model=contender.model, run=run, seed=seed, data_seed=seed, **contender.recipe
    )
