"""A table of the paper run again: learning rates tuned for every model alike, then the comparison, then its claims."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..training.config import TrainConfig
from .compare import compare
from .contender import Contender
from .report import notes
from .results import HEADER, Comparison, Row, cells
from .tables import Claim, Scale, Table


def recipe(base: TrainConfig, table: Table, scale: Scale) -> TrainConfig:
    """The authors' recipe (arXiv 2401.04081, table 5, and their code) at a scale; `base` has data and device.

    Adam's second beta, clipping, decay of all weights and the 1% of warm-up are theirs; evaluations are 20.
    """
    steps = scale.steps or table.steps
    return replace(
        base,
        steps=steps,
        batch_size=scale.batch_size,
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
        eval_every=max(1, steps // 20),
        save_every=max(1, steps // 4),
        log_every=max(1, steps // 200),
    )


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
    """Tune, compare, and write `results.md` beside what `compare` writes.

    Args:
        base: data and device; budget and recipe come from table and scale.
        out: of everything; runs of the tuning lie in `out/tuning`. What was stopped goes on there.
    Raises:
        what `compare` raises.
    """
    base = recipe(base, table, scale)
    contenders = [entry.contender(scale) for entry in table.entries]
    if scale.learning_rates:
        contenders = tuned(contenders, scale, base, out / "tuning", jobs=jobs, command=command, silent=silent)
    found = compare(contenders, base, scale.seeds, out, jobs=jobs, command=command, silent=silent)
    rates = {contender.name: contender.recipe["learning_rate"] for contender in contenders}
    (out / "results.md").write_text(markdown(table, scale, found, rates), encoding="utf-8")
    return found


def tuned(
    contenders: Sequence[Contender],
    scale: Scale,
    base: TrainConfig,
    out: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    silent: bool = False,
) -> list[Contender]:
    """The contenders with the learning rate, of those of the scale, that ends lowest after `tuning_steps`, seed 0."""
    steps = min(scale.tuning_steps, base.steps)
    short = replace(base, steps=steps, eval_every=steps, save_every=steps, log_every=10)
    tried = [
        Contender(f"{contender.name}-lr{rate:g}", contender.model, {**contender.recipe, "learning_rate": rate})
        for contender in contenders
        for rate in scale.learning_rates
    ]
    rows = compare(tried, short, 1, out, jobs=jobs, command=command, silent=silent).rows
    loss = {row.name: row.loss.mean for row in rows}
    chosen = []
    for contender in contenders:
        best = min(scale.learning_rates, key=lambda rate: loss[f"{contender.name}-lr{rate:g}"])
        chosen.append(replace(contender, recipe={**contender.recipe, "learning_rate": best}))
    (out / "learning-rates.json").write_text(json.dumps({c.name: c.recipe["learning_rate"] for c in chosen}) + "\n")
    return chosen


def verdict(claim: Claim, rows: Sequence[Row]) -> str:
    """What the runs say of a claim: "confirmed", "contradicted" or "no clear difference", with the difference.

    Differences are paired by seed; one stands out if all seeds agree and its mean exceeds their standard deviation.
    """
    by_name = {row.name: row for row in rows}
    better, worse = by_name[claim.better], by_name[claim.worse]
    sides = (better.accuracy, worse.accuracy) if claim.accuracy else (better.loss, worse.loss)
    differences = [a - b for a, b in zip(sides[0].values, sides[1].values, strict=True)]
    mean, seeds = statistics.fmean(differences), len(differences)
    gain = [d > 0 if claim.accuracy else d < 0 for d in differences]
    clear = math.isfinite(mean) and (seeds == 1 or abs(mean) > statistics.stdev(differences))
    found = "no clear difference"
    if clear and (all(gain) or not any(gain)):
        found = "confirmed" if all(gain) else "contradicted"
    text = f"{mean:+.2%}" if claim.accuracy else f"{mean:+.4f} nats"
    return f"{found} ({text}, {seeds} seed{'s' if seeds > 1 else ''})".replace("-", "−")


def says(claim: Claim) -> str:
    """A claim in words."""
    return f"{claim.better} {'more accurate than' if claim.accuracy else 'below'} {claim.worse}"


def markdown(table: Table, scale: Scale, found: Comparison, rates: dict[str, float]) -> str:
    """The results beside the paper's numbers, and what became of its claims."""
    settings = found.settings
    tokens = settings["steps"] * settings["batch_size"] * settings["context"]
    printed = {entry.name: entry.printed for entry in table.entries}
    header = (*HEADER[:4], HEADER[4], "paper", "paper's difference", *HEADER[5:], "learning rate")
    lines = [
        f"# {table.title}",
        "",
        f"{tokens:,} tokens a run: {settings['steps']:,} steps of {settings['batch_size']} × {settings['context']}. "
        f"Data: {settings['data']}; tokenizer: {settings['tokenizer']}.",
        f"Learning rates: {_chosen(scale, settings['steps'])}",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    first = printed[found.rows[0].name]
    for row, own in zip(found.rows, cells(found.rows, settings["steps"]), strict=True):
        paper = printed[row.name]
        difference = "–" if paper is None or first is None else f"{paper - first:+.2f}".replace("-", "−")
        figures = (*own[:5], "–" if paper is None else f"{paper:.2f}", difference, *own[5:], f"{rates[row.name]:g}")
        lines.append(f"| {' | '.join(figures)} |")
    lines += ["", "| the paper's claim | here |", "|---|---|"]
    lines += [f"| {says(claim)} | {verdict(claim, found.rows)} |" for claim in table.claims]
    lines += ["", notes(len(found.rows[0].loss.values)), "The paper's numbers are smoothed training losses on C4."]
    lines += ["", f"    {found.command}", ""] if found.command else [""]
    return "\n".join(lines)


def _chosen(scale: Scale, steps: int) -> str:
    if not scale.learning_rates:
        return "the paper's own."
    tried = ", ".join(f"{rate:g}" for rate in scale.learning_rates)
    return f"the best of {tried} after {min(scale.tuning_steps, steps):,} steps with seed 0, tried for every model."
