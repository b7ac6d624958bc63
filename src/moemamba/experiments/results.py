"""The figures of a comparison: spreads over seeds, paired differences, steps to equal loss; as a table and as JSON."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import ModelConfig, to_dict
from ..counting import ParameterCount, count_parameters, flops_per_token
from .history import Curve, History, crossing

STATES = ("diverged", "unfinished")  # of runs that do not count


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    model: str
    seed: int
    path: Path
    history: History
    state: Literal["finished", "diverged", "unfinished"] = "finished"

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def curve(self) -> Curve:
        """Held-out loss in nats per token, by step."""
        return self.history.curve("evaluation", "loss")


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds; not a number where no seed has it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None with a single seed, which says nothing about it."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        if not self.values:
            return {"values": []}
        return {"values": list(self.values), "mean": self.mean, "std": self.std, "low": self.low, "high": self.high}


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
    missing: str
    """what became of the other runs: "1 of 2 diverged"; empty if there are none"""
    loss: Spread
    """held-out loss at the last step, nats per token, without auxiliary losses and without dropping"""
    bits_per_byte: Spread
    accuracy: Spread
    """share of held-out tokens predicted right"""
    difference: Spread
    """loss minus the baseline's with the same seed, so on the same batches in the same order"""
    steps_to_baseline: tuple[float | None, ...]
    """steps to the baseline's last loss with the same seed, interpolated; None where it was not reached"""
    speed_up: Spread | None
    """steps that the baseline took to that loss over those of this model; None unless every seed reached it"""
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
            "missing": self.missing,
            "loss": self.loss.to_dict(),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "accuracy": self.accuracy.to_dict(),
            "difference": self.difference.to_dict(),
            "verdict": self.verdict,
            "steps_to_baseline": list(self.steps_to_baseline),
            "speed_up": self.speed_up.to_dict() if self.speed_up else None,
            "tokens_per_second": self.tokens_per_second.to_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found, for its table, `results.json` and report."""

    rows: list[Row]
    """the first is the baseline"""
    runs: list[Run]
    settings: dict[str, Any]
    """what all runs share: data, budget, schedule"""
    environment: dict[str, str]
    command: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "baseline": self.rows[0].name,
            "models": [row.to_dict() for row in self.rows],
            "runs": [
                {
                    "model": run.model,
                    "seed": run.seed,
                    "path": str(run.path),
                    "state": run.state,
                    "evaluation": run.history.evaluation,
                }
                for run in self.runs
            ],
            "settings": self.settings,
            "environment": self.environment,
            "command": self.command,
        }


def summarise(runs: list[Run], configs: dict[str, ModelConfig], context: int) -> list[Row]:
    """One row for each model of `configs`, the first of which is the baseline. Only finished runs count."""
    by_model = {name: sorted((r for r in runs if r.model == name), key=lambda r: r.seed) for name in configs}
    baseline = {run.seed: run for run in next(iter(by_model.values())) if run.finished}
    return [_row(name, configs[name], by_model[name], baseline, context) for name in configs]


def _row(name: str, config: ModelConfig, every: list[Run], baseline: dict[int, Run], context: int) -> Row:
    runs = [run for run in every if run.finished]
    pairs = [(run.curve, baseline[run.seed].curve) for run in runs if run.seed in baseline]
    steps = [crossing(ours, theirs[-1][1]) for ours, theirs in pairs]
    own = [crossing(theirs, theirs[-1][1]) for _, theirs in pairs]
    ratios = [theirs / ours for theirs, ours in zip(own, steps, strict=True) if theirs and ours]
    others = [f"{n} of {len(every)} {state}" for state in STATES if (n := sum(run.state == state for run in every))]
    return Row(
        name=name,
        config=config,
        parameters=count_parameters(config),
        flops_per_token=flops_per_token(config, context),
        seeds=tuple(run.seed for run in runs),
        paired=tuple(run.seed for run in runs if run.seed in baseline),
        missing=", ".join(others),
        loss=Spread(tuple(run.curve[-1][1] for run in runs)),
        bits_per_byte=Spread(tuple(run.history.evaluation[-1]["bits_per_byte"] for run in runs)),
        accuracy=Spread(tuple(run.history.evaluation[-1]["accuracy"] for run in runs)),
        difference=Spread(tuple(ours[-1][1] - theirs[-1][1] for ours, theirs in pairs)),
        steps_to_baseline=tuple(steps),
        speed_up=Spread(tuple(ratios)) if ratios and len(ratios) == len(pairs) else None,
        tokens_per_second=Spread(tuple(_speed(run) for run in runs)),
    )


def _speed(run: Run) -> float:
    """Median over the run: the first lines hold compilation and the machine's other work."""
    return statistics.median(value for _, value in run.history.curve("train", "tokens_per_second"))


HEADER = (
    "model",
    "parameters",
    "active",
    "held-out loss",
    "vs baseline",
    "bits/byte",
    "accuracy",
    "steps to its loss",
    "speed-up",
    "tokens/s",
)


def cells(rows: list[Row], steps: int) -> list[tuple[str, ...]]:
    """The table's text, one tuple of cells for each row, under `HEADER`."""
    return [
        (
            row.name,
            count(row.parameters.total),
            count(row.parameters.active),
            _loss(row),
            "baseline" if row is rows[0] else signed(row.difference),
            _mean(row.bits_per_byte, ".4f"),
            _mean(row.accuracy, ".2%"),
            _steps(row.steps_to_baseline, steps),
            f"{row.speed_up.mean:.2f}×" if row.speed_up else "–",
            _mean(row.tokens_per_second, ",.0f"),
        )
        for row in rows
    ]


def signed(difference: Spread) -> str:
    """`-0.0612 (-0.0660 … -0.0555)`: mean, then lowest and highest of the seeds; with real minus signs."""
    if not difference.values:
        return "–"
    text = f"{difference.mean:+.4f}"
    if difference.std is not None:
        text += f" ({difference.low:+.4f} … {difference.high:+.4f})"
    return text.replace("-", "−")


def count(n: float) -> str:
    """27131904 -> `27.1M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


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
