"""Several models, the same data in the same order and the same budget, over seeds."""

import contextlib
import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...config import ModelConfig
from ...data.config import NO_TEST
from ...device import find_device
from ...distributed import Processes
from ...host.files import replace
from ...host.progress import Report
from ...marks import changeable, marks
from ...reading import read_config
from ...training.config import TrainConfig, read_run
from ...training.spread import require_fit
from ..page import html_page, markdown
from ..results import (
    Comparison,
    History,
    Reproduction,
    RunResult,
    Status,
    read_history,
    read_results,
    summarise,
)
from .contender import Contender
from .planning import leaves, planned
from .runs import Task, carry_out

# What differs from run to run, and what says how a run is carried out rather than what it computes.
_OWN = {name for name, each in marks(TrainConfig).items() if each.of_one_run}
_FREE = changeable(TrainConfig, "always")


def compare(
    contenders: Sequence[Contender],
    base: TrainConfig,
    seeds: int,
    out: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    paper: Reproduction | None = None,
    silent: bool = False,
) -> Comparison:
    """Train every contender with every seed, and write `results.json`, `results.md` and `report.html`.

    A seed changes the initial weights and the order of the data; with one seed all models see the same batches. Each
    run is a run directory, `out/NAME/seed-N`: a comparison that was stopped goes on where it stood, and one that is
    finished only writes its report again. A run that diverged stays as it is, and the table says so; so does one that
    failed, for which the others are carried to their end first.

    Args:
        contenders: the first is the baseline. One with `steps` in its recipe has a schedule of that length, on the
            batches that the others begin with.
        base: data, budget and recipe of all of them; its `model`, `run`, `seed` and `data_seed` do not matter.
        out: directory of everything.
        jobs: runs at once, each a process with its share of this one's threads, spread over the GPUs; small models
            waste cores, and a GPU, otherwise.
        command: what was typed, for the report.
        paper: what the report holds the outcome against.
        silent: show no progress.
    Raises:
        ValueError: `out` holds runs of another comparison; and what `train` raises.
    """
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    plan = [(contender, seed) for seed in range(seeds) for contender in contenders]
    configs = planned(plan, base, out)
    for config in configs:
        require_fit(config, Processes(find_device(config.device)))  # before any of them is trained
    begun = [_begun(config) for config in configs]
    _tell_of_lost_runs(out, configs, silent)
    rounds: tuple[list[Task], list[Task]] = ([], [])  # branches come after what they branch off
    for k, ((contender, seed), config, resume) in enumerate(zip(plan, configs, begun, strict=True), start=1):
        if _read(contender, seed, config).status == "unfinished":
            task = Task(config, resume, f"[{k}/{len(plan)}] {contender.name}, seed {seed}")
            rounds[contender.trunk is not None].append(task)
    try:
        carry_out(rounds[0], jobs, silent)
        carry_out([task for task in rounds[1] if task.resume or leaves(task.config)], jobs, silent)
    except (RuntimeError, KeyboardInterrupt):
        with contextlib.suppress(Exception):  # what there is; the error says more
            _write(plan, configs, base, out, jobs, command, paper)
        raise
    return _write(plan, configs, base, out, jobs, command, paper)


def _write(
    plan: Sequence[tuple[Contender, int]],
    configs: Sequence[TrainConfig],
    base: TrainConfig,
    out: Path,
    jobs: int,
    command: str | None,
    paper: Reproduction | None,
) -> Comparison:
    """The results of the runs that there are."""
    runs = [_read(contender, seed, config) for (contender, seed), config in zip(plan, configs, strict=True)]
    contenders = [contender for contender, seed in plan if seed == 0]
    models = {contender.name: contender.model for contender in contenders}
    for contender, config in zip((contender for contender, _ in plan), configs, strict=True):
        if (Path(config.run) / "config.json").exists():
            models[contender.name] = read_config(ModelConfig, Path(config.run) / "config.json")  # the vocabulary's size
    rows = summarise(runs, models, base.context)
    trunks = {contender.name: {"trunk": contender.trunk} for contender in contenders if contender.trunk}
    recipes = {contender.name: contender.recipe | trunks.get(contender.name, {}) for contender in contenders}
    comparison = Comparison(rows, runs, _settings(base), recipes, _environment(jobs), command, paper)
    comparison.write(out / "results.json")
    _write_pages(comparison, out)
    return comparison


def _write_pages(comparison: Comparison, out: Path) -> None:
    """What is made of `results.json`, which is complete by now: a page that cannot be made loses nothing."""
    for name, page in (("results.md", markdown), ("report.html", html_page)):
        try:
            replace(out / name, page([comparison]))
        except Exception as error:
            text = f"moemamba: {name} is not written ({error}); `moemamba report {shlex.quote(str(out))}` makes it anew"
            with contextlib.suppress(OSError, ValueError):
                print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr)


def _read(contender: Contender, seed: int, config: TrainConfig) -> RunResult:
    """A run as it stands."""
    path = Path(config.run)
    status: Status = "unfinished"
    history = read_history(path) if (path / "metrics.jsonl").exists() else History([], [], [])
    if history.failure:
        status = "diverged"
    elif history.evaluation and history.evaluation[-1]["step"] == config.steps:
        saved = (path / "checkpoints" / f"{config.steps:08d}").is_dir()
        tested = config.test == NO_TEST or any(line["step"] == config.steps for line in history.test)
        status = "finished" if saved and tested else "unfinished"
    return RunResult.condensed(contender.name, seed, status, history, config.steps)


def _begun(config: TrainConfig) -> bool:
    """Whether this run exists already; raises ValueError if it is another one."""
    file = Path(config.run) / "train.json"
    if not file.exists():
        return False
    before = read_run(file)
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


def _tell_of_lost_runs(out: Path, configs: Sequence[TrainConfig], silent: bool) -> None:
    """Say which runs of `results.json` begin anew because their directories are gone.

    Raises:
        ValueError: all of them are, as where only the results were kept: those are not to be lost. Or the file is no
            comparison's.
    """
    file = out / "results.json"
    if not file.exists():
        return
    try:
        done = {f"{run.model}/seed-{run.seed}" for run in read_results(file).runs if run.finished}
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged or of another version ({error}); move it away, and what the runs beside it hold is "
            "written anew, or choose another --out"
        ) from error
    there = {name for name in done if (out / name).is_dir()}
    lost = sorted(done - there)
    if lost and not there:
        raise ValueError(
            f"{file} has finished runs, but none of their directories is left, so all would be trained again; "
            f"`moemamba report {shlex.quote(str(out))}` shows what it holds; to train again, choose "
            "another --out or remove it"
        )
    wanted = {str(Path(config.run).relative_to(out)) for config in configs}
    if again := [name for name in lost if name in wanted]:
        Report(silent=silent).note(
            f"{file} has results of {', '.join(again)}, whose directories are gone: trained again"
        )


def _settings(base: TrainConfig) -> dict[str, Any]:
    """What all runs share."""
    names = (field.name for field in dataclasses.fields(base) if field.name not in _OWN | _FREE)
    data = base.data if isinstance(base.data, tuple) else (base.data or "Python's standard library",)
    return {name: getattr(base, name) for name in names} | {"data": ", ".join(data)}


def _environment(jobs: int) -> dict[str, str]:
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return {
        "moemamba": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "device": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "runs at once": str(jobs),
    }
