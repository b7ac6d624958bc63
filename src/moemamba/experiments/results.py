"""The figures of a comparison: spreads over seeds, paired differences, steps to equal loss; as a table and as JSON."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..config import ModelConfig
from ..counting import ParameterCount, count_parameters, flops_per_token
from ..reading import from_dict, to_dict
from .history import Curve, crossing
from .record import Run
from .reproduction import Reproduction

STATES = ("diverged", "unfinished")  # of runs that do not count
FORMAT = 2  # of results.json


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


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found, for its table, `results.json` and report."""

    rows: list[Row]
    """the first is the baseline"""
    runs: list[Run]
    settings: dict[str, Any]
    """what all runs share: data, budget, schedule"""
    recipes: dict[str, dict[str, Any]]
    """by model, the settings in which it differs from `settings`"""
    environment: dict[str, str]
    command: str | None
    paper: Reproduction | None = None

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return int(self.settings["batch_size"] * self.settings["context"])

    def setting(self, model: str, name: str) -> Any:
        """One model's value of a setting, such as its learning rate."""
        return self.recipes.get(model, {}).get(name, self.settings[name])

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": self.command,
            "settings": self.settings,
            "recipes": self.recipes,
            "environment": self.environment,
            "paper": self.paper.to_dict() if self.paper else None,
            "baseline": self.rows[0].name,
            "models": [row.to_dict() for row in self.rows],
            "runs": [run.to_dict() for run in self.runs],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `to_dict` wrote down, its figures counted again from the runs.

        Raises:
            ValueError: it is not of this format.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"its format is {values.get('format')}, not {FORMAT}; run its command again where the runs are"
            )
        runs = [Run.from_dict(run) for run in values["runs"]]
        models = {row["name"]: from_dict(ModelConfig, row["config"], row["name"]) for row in values["models"]}
        return cls(
            summarise(runs, models, values["settings"]["context"]),
            runs,
            values["settings"],
            values["recipes"],
            values["environment"],
            values["command"],
            Reproduction.from_dict(values["paper"]) if values["paper"] else None,
        )

    def write(self, path: Path) -> None:
        """As JSON, a line for each model and run; an older file is replaced when this one is complete."""
        lines = []
        for key, value in self.to_dict().items():
            text = json.dumps(value, separators=(",", ":"))
            if key in ("models", "runs"):
                text = "[\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in value) + "\n]"
            lines.append(f"{json.dumps(key)}: {text}")
        beside = path.with_name(f".{path.name}")
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        beside.replace(path)


def read_results(path: Path) -> Comparison:
    """The comparison of a `results.json`, or of the folder that holds it.

    Raises:
        ValueError: the file is something else.
        OSError: there is none.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        return Comparison.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{file} is not a comparison's results.json that this version can read: {what}") from None


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
        bits_per_byte=Spread(tuple(run.evaluation[-1]["bits_per_byte"] for run in runs)),
        accuracy=Spread(tuple(run.evaluation[-1]["accuracy"] for run in runs)),
        drop_gap=Spread(tuple(gap for run in runs if (gap := run.evaluation[-1].get("drop_gap")) is not None)),
        difference=Spread(tuple(round(ours.curve[-1][1] - theirs.curve[-1][1], 6) for ours, theirs in pairs)),
        steps_to_baseline=steps,
        speed_up=ratios,
        training_loss=Spread(tuple(run.training[-1][1] for run in runs)),
        training_speed_up=training_ratios,
        tokens_per_second=Spread(tuple(run.tokens_per_second for run in runs)),
    )


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
