"""A table of the paper run again: learning rates tuned for every model alike, then the comparison, then its claims."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...counting import count_parameters
from ...host.files import new_directory
from ...training.config import TrainConfig
from ..compare import Contender, compare
from ..page import count
from ..results import Comparison, Reproduction, Tuning
from .tables import Scale, Table
from .tuning import named, tune, tuned


def recipe(base: TrainConfig, table: Table, scale: Scale) -> TrainConfig:
    """The authors' recipe (arXiv 2401.04081, table 5, and their code) at a scale; `base` has data and device.

    Adam's second beta, clipping, decay of all weights and the 1% of warm-up are theirs; evaluations are 40.
    """
    steps = scale.steps or table.steps
    return replace(
        base,
        steps=steps,
        batch_size=rows(table, scale),
        context=scale.context,
        sampling=scale.sampling,
        optimizer="adamw",
        schedule="cosine",
        warmup=0.01,
        final_lr=0.1,
        weight_decay=0.1,
        decay="all",
        beta1=0.9,
        beta2=0.999,
        clip=0.5,
        eval_every=max(1, steps // 40),
        save_every=max(1, steps // 4),
        log_every=max(1, steps // 200),
    )


def rows(table: Table, scale: Scale) -> int:
    """Sequences in a step: the table's own at the paper's scale, whose steps are the table's."""
    return table.batch_size if scale.batch_size == Table.batch_size else scale.batch_size


def tuning_steps(scale: Scale, steps: int) -> int:
    """Steps of a run that tries a learning rate, where the comparison's have `steps`."""
    return min(scale.tuning_steps or steps, steps)


def plan(table: Table, scale: Scale) -> list[str]:
    """What `reproduce` is going to run, in a few lines."""
    steps, tokens = scale.steps or table.steps, rows(table, scale) * scale.context
    short = tuning_steps(scale, steps)
    models = [
        f"{entry.name} ({count(parameters.total)}, {count(parameters.active)} active)"
        for entry in table.entries
        for parameters in [count_parameters(entry.contender(scale).model)]
    ]
    grids: dict[tuple[float, ...], list[str]] = {}
    for entry in table.entries:
        if len(rates := entry.rates(scale)) > 1:
            grids.setdefault(rates, []).append(entry.name)
    tried = sum(len(rates) * len(names) for rates, names in grids.items())
    whole = short == steps  # then a tuning run is the comparison's too
    runs = len(table.entries) * scale.seeds
    lines = [
        f"{table.title}: {runs} runs, {len(models)} models with {scale.seeds} seed{'s' if scale.seeds > 1 else ''}, of "
        f"{count(steps * tokens)} tokens ({steps:,} steps of {rows(table, scale)} × {scale.context}) each",
        f"models: {', '.join(models)}; without embedding and head",
    ]
    if tried:
        grid = (f"{', '.join(map('{:g}'.format, own))} with {', '.join(names)}" for own, names in grids.items())
        lines.append(
            f"before that {tried} runs of {count(short * tokens)} tokens ({short:,} steps) to choose learning rates: "
            f"{'; '.join(grid)}; more where a best rate lies at the edge"
            + ("; the best of each is its run with seed 0" if whole else "")
        )
    if whole:
        runs -= sum(map(len, grids.values()))
    lines.append(
        f"in all {count((runs * steps + tried * short) * tokens)} tokens; the same command goes on where it was stopped"
    )
    return lines


def reproduce(
    table: Table,
    scale: Scale,
    base: TrainConfig,
    out: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    silent: bool = False,
) -> Comparison:
    """Tune, compare, and write what `compare` writes.

    Args:
        base: data and device; budget and recipe come from table and scale.
        out: of everything; runs of the tuning lie in `out/tuning`. What was stopped goes on there. If tuning runs are
            as long as the comparison's, the best of each model is its run with seed 0.
    Raises:
        what `compare` raises.
    """
    base = recipe(base, table, scale)
    contenders = [entry.contender(scale) for entry in table.entries]
    rates = {entry.name: own for entry in table.entries if len(own := entry.rates(scale)) > 1}
    tunings: dict[str, Tuning] = {}
    if rates:
        steps = tuning_steps(scale, base.steps)
        short = base
        if steps < base.steps:
            short = replace(base, steps=steps, eval_every=steps, save_every=steps, log_every=10)
        unsure = [contender for contender in contenders if contender.name in rates]
        tunings = tune(unsure, rates, short, out / "tuning", jobs=jobs, command=command, silent=silent)
        contenders = tuned(contenders, tunings)
        if short is base:
            _take([contender for contender in contenders if contender.name in tunings], out)
    paper = Reproduction(
        table.title,
        {entry.name: entry.printed for entry in table.entries if entry.printed is not None},
        {entry.name: entry.faster for entry in table.entries if entry.faster is not None},
        table.claims,
        tuning_steps(scale, base.steps),
        tunings,
    )
    return compare(contenders, base, scale.seeds, out, jobs=jobs, command=command, paper=paper, silent=silent)


def _take(contenders: Sequence[Contender], out: Path) -> None:
    """Copy the tuning's run of each contender to where the comparison looks for its run with seed 0."""
    for contender in contenders:
        source = out / "tuning" / named(contender.name, contender.recipe["learning_rate"]) / "seed-0"
        place = out / contender.name / "seed-0"
        if not place.exists():
            with new_directory(place) as beside:  # a copy that is cut off must not look like a run
                shutil.copytree(source, beside, dirs_exist_ok=True)
