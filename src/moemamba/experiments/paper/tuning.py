"""Learning rates chosen for every model alike: the best of a grid after a short run, the grid widened where it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...host.files import write_json
from ...host.progress import Report
from ...training.config import TrainConfig
from ..compare import Contender, compare
from ..results import Tuning

EXTENSIONS = 2  # how often a grid is widened by a factor of two, if its best rate lies at its edge


def tune(
    contenders: Sequence[Contender],
    rates: Mapping[str, Sequence[float]],
    base: TrainConfig,
    out: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    silent: bool = False,
) -> dict[str, Tuning]:
    """The learning rates of contenders, by name, and `out/learning-rates.json`.

    Every rate is a run with seed 0 as `base` says, whose cosine is as long as the run. If a model's best rate is the
    highest or lowest tried, the next one beyond it is tried too, at most twice.

    Args:
        rates: to try with each contender, two or more.
    """
    tried = {contender.name: list(rates[contender.name]) for contender in contenders}
    note = Report(silent=silent).note
    for widened in range(EXTENSIONS + 1):
        most = max(map(len, tried.values()))
        runs = [  # rate by rate, so that what starts at once are different models, which compile different code
            (contender, tried[contender.name][place])
            for place in range(most)
            for contender in contenders
            if place < len(tried[contender.name])
        ]
        models = [Contender(named(c.name, rate), c.model, {**c.recipe, "learning_rate": rate}) for c, rate in runs]
        rows = compare(models, base, 1, out, jobs=jobs, command=command, silent=silent).rows
        loss = {row.name: row.loss.mean if row.loss.values else math.inf for row in rows}
        found = {name: Tuning({rate: loss[named(name, rate)] for rate in own}) for name, own in tried.items()}
        values = {name: tuning.to_dict() for name, tuning in found.items()}
        write_json(out / "learning-rates.json", values)
        more = {name: rate for name, tuning in found.items() if (rate := tuning.beyond) is not None}
        for name, rate in more.items():
            edge = f"{name} is best at {found[name].chosen:g}, the edge of the learning rates tried"
            note(f"{edge}; trying {rate:g} too" if widened < EXTENSIONS else f"{edge}; taken as it is")
            tried[name].append(rate)
        if not more:
            break
    return found


def tuned(contenders: Sequence[Contender], found: Mapping[str, Tuning]) -> list[Contender]:
    """The contenders, those that were tuned with their learning rate."""
    return [
        replace(c, recipe={**c.recipe, "learning_rate": found[c.name].chosen}) if c.name in found else c
        for c in contenders
    ]


def named(name: str, rate: float) -> str:
    """What the tuning calls a model at one of its rates."""
    return f"{name}-lr{rate:g}"
