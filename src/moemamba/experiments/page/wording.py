"""Figures and verdicts as text."""

import statistics
from collections.abc import Sequence
from typing import Literal

from ..results import Claim, Row, Spread, error_of_difference, paired

Measure = Literal["loss", "capped_loss", "averaged", "training_loss", "test", "capped_test", "averaged_test"]


HEADER = (
    "model",
    "parameters",
    "active",
    "held-out loss",
    "vs baseline",
    "steps to its loss",
    "speed-up",
    "training loss",
    "speed-up by it",
    "accuracy",
    "bits/byte",
    "tokens/s",
    "with capacity",
    "speed-up with it",
    "speed-up in time",
)
LEAST = (
    "speed-up with it",
    "with capacity",
    "speed-up by it",
    "training loss",
    "tokens/s",
    "speed-up in time",
    "bits/byte",
    "accuracy",
    "steps to its loss",
    "parameters",
    "speed-up",
)
"""columns of the table that a narrow terminal does without, first those that it misses least"""


def cells(rows: list[Row]) -> list[tuple[str, ...]]:
    """The table's text, one tuple of cells for each row, under `HEADER`."""
    return [
        (
            row.name,
            count(row.parameters.total),
            count(row.parameters.active),
            _loss(row),
            "baseline" if row is rows[0] else signed(row.difference),
            _steps(row.steps_to_baseline, row.steps),
            times(row.speed_up),
            _mean(row.training_loss, ".4f"),
            times(row.training_speed_up),
            _mean(row.accuracy, ".2%"),
            _mean(row.bits_per_byte, ".4f"),
            _mean(row.tokens_per_second, ",.0f"),
            _mean(row.capped_loss, ".4f"),
            times(row.capped_speed_up),
            times(row.time_speed_up),
        )
        for row in rows
    ]


def _loss(row: Row) -> str:
    parts = [about(row.loss)] if row.loss.values else []
    return "; ".join([*parts, *([row.missing] if row.missing else [])])


def about(spread: Spread) -> str:
    """`1.4053 ± 0.0062`: mean and standard deviation."""
    return f"{spread.mean:.4f}" + (f" ± {spread.std:.4f}" if spread.std is not None else "")


def _mean(spread: Spread, form: str) -> str:
    return format(spread.mean, form) if spread.values else "–"


def _steps(reached: tuple[float | None, ...], steps: int) -> str:
    values = [value for value in reached if value is not None]
    if not reached:
        return "–"
    if len(values) == len(reached):
        return f"{statistics.fmean(values):,.0f}"
    return f"> {steps:,}" + (f" ({len(values)} of {len(reached)} did)" if values else "")


def signed(difference: Spread) -> str:
    """`-0.0612 (-0.0660 … -0.0555)`: mean, then lowest and highest of the seeds; with real minus signs."""
    if not difference.values:
        return "–"
    text = f"{difference.mean:+.4f}"
    if difference.std is not None:
        text += f" ({difference.low:+.4f} … {difference.high:+.4f})"
    return text.replace("-", "−")


def times(ratio: Spread | None) -> str:
    """`1.46× (1.44 … 1.49)`"""
    if ratio is None or not ratio.values:
        return "–"
    return f"{ratio.mean:.2f}×" + (f" ({ratio.low:.2f} … {ratio.high:.2f})" if ratio.std is not None else "")


def count(n: float) -> str:
    """27131904 -> `27.1M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def says(claim: Claim) -> str:
    """A claim in words."""
    return f"{claim.better} {'more accurate than' if claim.accuracy else 'below'} {claim.worse}"


def verdict(claim: Claim, rows: Sequence[Row], measure: Measure = "loss") -> str:
    """What the runs say of a claim: "confirmed", "contradicted" or "no clear difference", with the difference and its
    standard error; with one seed only which side is lower (or more accurate), since its noise is unknown.

    Differences are paired by seed; `Spread.clear` says which stand out.

    Args:
        measure: of a claim on loss: held-out, held-out with the capacity limits of training or with averaged weights,
            smoothed training loss, or the first three on the test text, where one seed has a standard error at least
            over that text.
    """
    by_name = {row.name: row for row in rows}
    better, worse = by_name[claim.better], by_name[claim.worse]
    d = paired(better, worse, "accuracy" if claim.accuracy else measure)
    if not d.values:
        return f"not to be judged ({', '.join(f'{row.name}: {row.missing}' for row in (better, worse) if row.missing)})"
    form, unit = (".2%", "") if claim.accuracy else (".4f", " nats")
    mean, error = format(d.mean, f"+{form}"), d.standard_error
    if error is None:
        side = "no difference" if d.side == "equal" else d.side
        over = text_error(better, worse) if measure == "test" and not claim.accuracy else None
        return f"{side}, one seed ({mean}{unit}{'' if over is None else f', ± {over:.4f} over the text'})".replace(
            "-", "−"
        )
    found = "no clear difference"
    if d.clear:
        found = "confirmed" if (d.side == "higher") == claim.accuracy else "contradicted"
    return f"{found} ({mean} ± {error:{form}}{unit}, {len(d.values)} seeds)".replace("-", "−")


def text_error(first: Row, second: Row) -> float | None:
    """Standard error over the test text of two models' difference, with the first seed that both have."""
    theirs = dict(zip(second.seeds, second.tests, strict=False))
    shared = ((test, theirs[seed]) for seed, test in zip(first.seeds, first.tests, strict=False) if seed in theirs)
    return next((error for pair in shared if (error := error_of_difference(*pair)) is not None), None)
