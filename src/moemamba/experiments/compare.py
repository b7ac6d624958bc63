"""Several models, the same data in the same order and the same budget, over seeds."""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import ModelConfig, from_dict
from ..counting import count_parameters
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.progress import Report
from .contender import RECIPE, Contender
from .history import read_history
from .report import report
from .results import Comparison, Run, summarise

# What differs from run to run, and what says how a run is carried out rather than what it computes.
_OWN = {"model", "run", "seed", "data_seed"}
_FREE = {"run", "device", "compile", "recompute", "save_every", "keep", "log_every", "tensorboard"}


def compare(
    contenders: Sequence[Contender],
    base: TrainConfig,
    seeds: int,
    out: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    silent: bool = False,
) -> Comparison:
    """Train every contender with every seed, and write `results.json` and `report.html`.

    A seed changes the initial weights and the order of the data; with one seed all models see the same batches. Each
    run is a run directory, `out/NAME/seed-N`: a comparison that was stopped goes on where it stood, and one that is
    finished only writes its report again.

    Args:
        contenders: the first is the baseline.
        base: data, budget and recipe of all of them; its `model`, `run`, `seed` and `data_seed` do not matter.
        out: directory of everything.
        jobs: runs at once, each a process with its share of this one's threads; small models waste cores otherwise.
        command: what was typed, for the report.
        silent: show no progress.
    Raises:
        ValueError: `out` holds runs of another comparison; and what `train` raises.
    """
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    plan = [(contender, seed) for seed in range(seeds) for contender in contenders]
    configs = [_config(contender, base, seed, out) for contender, seed in plan]
    begun = [_begun(config) for config in configs]
    labels = [f"[{k}/{len(plan)}] {contender.name}, seed {seed}" for k, (contender, seed) in enumerate(plan, start=1)]
    if jobs == 1:
        for config, resume, label in zip(configs, begun, labels, strict=True):
            train(config, resume, report=Report(label, silent))
    else:
        _train_at_once(jobs, configs, begun, labels, silent)
    runs = [
        Run(contender.name, seed, Path(config.run), read_history(Path(config.run)))
        for (contender, seed), config in zip(plan, configs, strict=True)
    ]
    models = {run.model: _model(run.path) for run in runs}
    rows = summarise(runs, models, base.context)
    comparison = Comparison(rows, runs, _settings(base, contenders), _environment(jobs), command)
    (out / "results.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(report(comparison), encoding="utf-8")
    return comparison


def _train_at_once(
    jobs: int, configs: Sequence[TrainConfig], begun: Sequence[bool], labels: Sequence[str], silent: bool
) -> None:
    """Train in processes of their own; the first error ends the comparison once the runs under way are done."""
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        # The largest models first, so that the last run to end is a short one.
        work = sorted(zip(configs, begun, labels, strict=True), key=lambda run: -count_parameters(run[0].model).total)
        futures = [pool.submit(_train_one, config, resume, label, silent) for config, resume, label in work]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_one(config: TrainConfig, resume: bool, label: str, silent: bool) -> None:
    train(config, resume, report=Report(label, silent, plain=True))


def _config(contender: Contender, base: TrainConfig, seed: int, out: Path) -> TrainConfig:
    own: dict[str, Any] = {
        "model": contender.model,
        "run": str(out / contender.name / f"seed-{seed}"),
        "seed": seed,
        "data_seed": seed,
    }
    return dataclasses.replace(base, **own, **contender.recipe)


def _begun(config: TrainConfig) -> bool:
    """Whether this run exists already; raises ValueError if it is another one."""
    file = Path(config.run) / "train.json"
    if not file.exists():
        return False
    before = from_dict(TrainConfig, json.loads(file.read_text(encoding="utf-8")), str(file))
    vocab_size = before.model.vocab_size  # the tokenizer's, whatever was asked for
    wanted = dataclasses.replace(config, model=config.model.replace(vocab_size=vocab_size))
    for name in (field.name for field in dataclasses.fields(TrainConfig)):
        then, now = getattr(before, name), getattr(wanted, name)
        if name == "routing_groups" and now is None:  # what the run settled on
            continue
        if then != now and name not in _FREE:
            raise ValueError(
                f"{config.run} was made with {name} = {then}, not {now}; choose another --out, or remove that folder"
            )
    return True


def _model(run: Path) -> ModelConfig:
    """The configuration that was trained, with the tokenizer's vocabulary."""
    return from_dict(ModelConfig, json.loads((run / "config.json").read_text(encoding="utf-8")), str(run))


def _settings(base: TrainConfig, contenders: Sequence[Contender]) -> dict[str, Any]:
    """What all runs share, and where one has a recipe of its own, that."""
    settings = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name not in _OWN | _FREE
    }
    for name in RECIPE:
        if own := {contender.name: contender.recipe[name] for contender in contenders if name in contender.recipe}:
            settings[name] = f"{settings[name]}; {', '.join(f'{model}: {value}' for model, value in own.items())}"
    return settings | {"data": base.data or "Python's standard library"}


def _environment(jobs: int) -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "moemamba": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "device": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "runs at once": str(jobs),
    }
