"""What is said about one model of a comparison: spreads over seeds, paired differences, steps to equal loss."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig
from ..counting import ParameterCount, count_parameters, flops_per_token
from ..reading import to_dict
from .history import Curve, crossing
from .record import Run
from .spread import Spread, count, signed, times

STATES = ("diverged", "unfinished")  # of runs that do not count


@dataclass(frozen=True)
class Row:
    """What is said about one model. Values stand in the order of `seeds`, differences in that of `paired`."""

    name: str
    config: ModelConfig
    parameters: ParameterCount
    flops_per_token: float
    seeds: tuple[int, ...]
    """whose runs are finished"""
    paired: tuple[int, ...]
    """those of them whose baseline is finished too"""
    steps: int
    """of its runs, whose schedules are as long"""
    missing: str
    """what became of the other runs: "1 of 2 diverged"; empty if there are none"""
    loss: Spread
    """held-out loss at the last step, nats per token, without auxiliary losses and without dropping"""
    bits_per_byte: Spread
    accuracy: Spread
    """share of held-out tokens predicted right"""
    drop_gap: Spread
    """what the capacity limits of training would add to the loss; empty without any"""
    difference: Spread
    """loss minus the baseline's with the same seed, so on the same batches in the same order"""
    steps_to_baseline: tuple[float | None, ...]
    """steps to the baseline's last held-out loss with the same seed, interpolated; None where it was not reached"""
    speed_up: Spread | None
    """steps that the baseline took to that loss over those of this model; None unless every seed reached it"""
    training_loss: Spread
    """smoothed training loss at the last step, the paper's measure, but without auxiliary losses"""
    training_speed_up: Spread | None
    """the same as `speed_up`, on the smoothed training loss"""
    tokens_per_second: Spread

    @property
    def verdict(self) -> str:
        """Whether the difference stands out from the seeds' spread, in words."""
        seeds, d = len(self.difference.values), self.difference
        if self.missing or not seeds:
            return self.missing or "no baseline to compare with"
        if d.std is None:
            return "one seed, so the spread is unknown"
        clear = d.low * d.high > 0 and abs(d.mean) > d.std
        return f"{'lower' if d.mean < 0 else 'higher'} with each of {seeds} seeds" if clear else "no clear difference"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "config": to_dict(self.config),
            "parameters": self.parameters._asdict(),
            "flops_per_token": self.flops_per_token,
            "seeds": list(self.seeds),
            "paired": list(self.paired),
            "steps": self.steps,
            "missing": self.missing,
            "loss": self.loss.to_dict(),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "accuracy": self.accuracy.to_dict(),
            "drop_gap": self.drop_gap.to_dict(),
            "difference": self.difference.to_dict(),
            "verdict": self.verdict,
            "steps_to_baseline": list(self.steps_to_baseline),
            "speed_up": self.speed_up.to_dict() if self.speed_up else None,
            "training_loss": self.training_loss.to_dict(),
            "training_speed_up": self.training_speed_up.to_dict() if self.training_speed_up else None,
            "tokens_per_second": self.tokens_per_second.to_dict(),
        }


def summarise(runs: list[Run], configs: dict[str, ModelConfig], context: int) -> list[Row]:
    """One row for each model of `configs`, the first of which is the baseline. Only finished runs count."""
    by_model = {name: sorted((r for r in runs if r.model == name), key=lambda r: r.seed) for name in configs}
    baseline = {run.seed: run for run in next(iter(by_model.values())) if run.finished}
    return [_row(name, configs[name], by_model[name], baseline, context) for name in configs]


def _row(name: str, config: ModelConfig, every: list[Run], baseline: dict[int, Run], context: int) -> Row:
    runs = [run for run in every if run.finished]
    pairs = [(run, baseline[run.seed]) for run in runs if run.seed in baseline]
    steps, ratios = _faster([(ours.curve, theirs.curve) for ours, theirs in pairs])
    _, training_ratios = _faster([(ours.training, theirs.training) for ours, theirs in pairs])
    others = [f"{n} of {len(every)} {state}" for state in STATES if (n := sum(run.state == state for run in every))]
    return Row(
        name=name,
        config=config,
        parameters=count_parameters(config),
        flops_per_token=flops_per_token(config, context),
        seeds=tuple(run.seed for run in runs),
        paired=tuple(run.seed for run in runs if run.seed in baseline),
        steps=max((int(run.curve[-1][0]) for run in runs), default=0),
        missing=", ".join(others),
        loss=Spread(tuple(run.curve[-1][1] for run in runs)),
        bits_per_byte=_last(runs, "bits_per_byte"),
        accuracy=_last(runs, "accuracy"),
        drop_gap=_last(runs, "drop_gap"),
        difference=Spread(tuple(round(ours.curve[-1][1] - theirs.curve[-1][1], 6) for ours, theirs in pairs)),
        steps_to_baseline=steps,
        speed_up=ratios,
        training_loss=Spread(tuple(run.training[-1][1] for run in runs if run.training)),
        training_speed_up=training_ratios,
        tokens_per_second=Spread(tuple(s for run in runs if not math.isnan(s := run.tokens_per_second))),
    )


def _last(runs: Sequence[Run], key: str) -> Spread:
    """One of the last held-out figures of runs, of those that have it."""
    return Spread(tuple(value for run in runs if (value := run.evaluation[-1].get(key)) is not None))


def _faster(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[tuple[float | None, ...], Spread | None]:
    """Steps of each curve to the last loss of its baseline, and how many times those of the baseline they are."""
    steps = tuple(crossing(ours, theirs[-1][1]) if theirs else None for ours, theirs in pairs)
    own = [crossing(theirs, theirs[-1][1]) if theirs else None for _, theirs in pairs]
    ratios = [theirs / ours for theirs, ours in zip(own, steps, strict=True) if theirs and ours]
    return steps, Spread(tuple(ratios)) if ratios and len(ratios) == len(pairs) else None


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
)


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
        )
        for row in rows
    ]


def _loss(row: Row) -> str:
    spread = f" ± {row.loss.std:.4f}" if row.loss.std is not None else ""
    parts = [f"{row.loss.mean:.4f}{spread}"] if row.loss.values else []
    return "; ".join([*parts, *([row.missing] if row.missing else [])])


def _mean(spread: Spread, form: str) -> str:
    return format(spread.mean, form) if spread.values else "–"


def _steps(reached: tuple[float | None, ...], steps: int) -> str:
    values = [value for value in reached if value is not None]
    if not reached:
        return "–"
    if len(values) == len(reached):
        return f"{statistics.fmean(values):,.0f}"
    return f"> {steps:,}" + (f" ({len(values)} of {len(reached)} did)" if values else "")
