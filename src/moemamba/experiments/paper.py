"""A table of the paper run again: learning rates tuned for every model alike, then the comparison, then its claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..training.config import TrainConfig
from .compare import compare
from .report import notes
from .results import HEADER, Comparison, Row, cells
from .tables import Claim, Scale, Table
from .tuning import Tuning, apply, tune


def recipe(base: TrainConfig, table: Table, scale: Scale) -> TrainConfig:
    """The authors' recipe (arXiv 2401.04081, table 5, and their code) at a scale; `base` has data and device.

    Adam's second beta, clipping, decay of all weights and the 1% of warm-up are theirs; evaluations are 40.
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
        eval_every=max(1, steps // 40),
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
    rates = {entry.name: own for entry in table.entries if len(own := entry.rates(scale)) > 1}
    tunings: dict[str, Tuning] = {}
    if rates:
        steps = min(scale.tuning_steps, base.steps)
        short = replace(base, steps=steps, eval_every=steps, save_every=steps, log_every=10)
        unsure = [contender for contender in contenders if contender.name in rates]
        tunings = tune(unsure, rates, short, out / "tuning", jobs=jobs, command=command, silent=silent)
        contenders = apply(contenders, tunings)
    found = compare(contenders, base, scale.seeds, out, jobs=jobs, command=command, silent=silent)
    chosen = {contender.name: contender.recipe["learning_rate"] for contender in contenders}
    (out / "results.md").write_text(markdown(table, scale, found, chosen, tunings), encoding="utf-8")
    return found


def verdict(claim: Claim, rows: Sequence[Row]) -> str:
    """What the runs say of a claim: "confirmed", "contradicted" or "no clear difference", with the difference.

    Differences are paired by seed; one stands out if all seeds agree and its mean exceeds their standard deviation.
    """
    by_name = {row.name: row for row in rows}
    better, worse = by_name[claim.better], by_name[claim.worse]
    sides = (better.accuracy, worse.accuracy) if claim.accuracy else (better.loss, worse.loss)
    ours, theirs = (
        dict(zip(row.seeds, side.values, strict=True)) for row, side in zip((better, worse), sides, strict=True)
    )
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not differences:
        return f"not to be judged ({', '.join(f'{row.name}: {row.missing}' for row in (better, worse) if row.missing)})"
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


def markdown(
    table: Table, scale: Scale, found: Comparison, chosen: Mapping[str, float], tunings: Mapping[str, Tuning]
) -> str:
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
        "",
        *_table(
            header,
            [
                (*own[:5], *_printed(printed[row.name], printed[found.rows[0].name]), *own[5:], f"{chosen[row.name]:g}")
                for row, own in zip(found.rows, cells(found.rows, settings["steps"]), strict=True)
            ],
        ),
        "",
        *_table(("claim", "here"), [(says(claim), verdict(claim, found.rows)) for claim in table.claims]),
        "",
        notes(len({run.seed for run in found.runs})),
        "The paper's numbers are smoothed training losses on C4.",
        "",
        *_rates(tunings, min(scale.tuning_steps, settings["steps"])),
    ]
    lines += ["", f"    {found.command}", ""] if found.command else [""]
    return "\n".join(lines)


def _printed(loss: float | None, baseline: float | None) -> tuple[str, str]:
    """The paper's loss, and its difference from the paper's baseline."""
    difference = "–" if loss is None or baseline is None else f"{loss - baseline:+.2f}".replace("-", "−")
    return "–" if loss is None else f"{loss:.2f}", difference


def _rates(tunings: Mapping[str, Tuning], steps: int) -> list[str]:
    """How the learning rates were chosen."""
    if not tunings:
        return ["Learning rates were given, not tuned."]
    tried = sorted({rate for tuning in tunings.values() for rate in tuning.losses})
    rows = []
    for name, tuning in tunings.items():
        at = {rate: "diverged" if math.isinf(loss) else f"{loss:.4f}" for rate, loss in tuning.losses.items()}
        at[tuning.chosen] = f"**{at[tuning.chosen]}**"
        rows.append((name, *(at.get(rate, "") for rate in tried), "yes" if tuning.beyond is not None else ""))
    return [
        f"Learning rates: the best after {steps:,} steps with seed 0, chosen alike for every model; a grid was widened "
        "by a factor of two, at most twice, where its best rate lay at its edge. Held-out loss of each:",
        "",
        *_table(("model", *(f"{rate:g}" for rate in tried), "still at the edge"), rows),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
