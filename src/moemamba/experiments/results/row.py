"""What is said about one model of a comparison: spreads over seeds, paired differences, steps to equal loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...config import ModelConfig
from ...counting import ParameterCount, count_parameters, flops_per_token
from ...reading import to_dict
from .history import Curve, crossing
from .record import RunResult
from .spread import Spread
from .tested import Test

NONE = Spread(())
UNCOUNTED = ("diverged", "unfinished")  # runs that no figure is of


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
    averaged: Spread
    """held-out loss of the averaged weights (`TrainConfig.average`); empty without any"""
    averaged_difference: Spread
    """that loss minus the lower of the baseline's two, of its weights and of their average, with the same seed"""
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
    capped_loss: Spread
    """held-out loss with the capacity limits of training, so with the tokens dropped that they drop; without such
    limits the same as `loss`"""
    capped_difference: Spread
    """that loss minus the baseline's with the same seed"""
    capped_speed_up: Spread | None
    """the same as `speed_up`, on the capped loss"""
    training_difference: Spread
    """training loss minus the baseline's with the same seed"""
    time_speed_up: Spread | None
    """`speed_up` in time: times this model's tokens a second over the baseline's"""
    own_schedule: bool = False
    """its learning rate fell within other steps than the baseline's, so that its speed-up is another measure"""
    tests: tuple[Test | None, ...] = ()
    """what each run came to on the text that nothing was chosen by, in the order of `seeds`"""
    test_difference: Spread = NONE
    """its loss there minus the baseline's with the same seed"""
    capped_test_difference: Spread = NONE
    """the same with the capacity limits of training"""
    averaged_test_difference: Spread = NONE
    """that of averaged weights there, minus the lower of the baseline's two"""

    @property
    def test(self) -> Spread:
        """Loss there, dropless."""
        return Spread(tuple(test.loss for test in self.tests if test))

    @property
    def averaged_test(self) -> Spread:
        """Loss there of the averaged weights, of runs that have some."""
        return Spread(tuple(test.averaged for test in self.tests if test and test.averaged is not None))

    @property
    def capped_test(self) -> Spread:
        """Loss there with the capacity limits of training."""
        return Spread(tuple(test.capped_loss for test in self.tests if test))

    @property
    def verdict(self) -> str:
        """Whether the difference stands out, in words: see `Spread.clear`."""
        seeds, d = len(self.difference.values), self.difference
        if self.missing or not seeds:
            return self.missing or "no baseline to compare with"
        if seeds == 1:
            return f"{d.side}, one seed"
        return f"{d.side} with each of {seeds} seeds" if d.clear else "no clear difference"

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
            **self._averaged(),
            "difference": self.difference.to_dict(),
            "verdict": self.verdict,
            "steps_to_baseline": list(self.steps_to_baseline),
            "speed_up": self.speed_up.to_dict() if self.speed_up else None,
            "training_loss": self.training_loss.to_dict(),
            "training_speed_up": self.training_speed_up.to_dict() if self.training_speed_up else None,
            "tokens_per_second": self.tokens_per_second.to_dict(),
            "capped_loss": self.capped_loss.to_dict(),
            "capped_difference": self.capped_difference.to_dict(),
            "capped_speed_up": self.capped_speed_up.to_dict() if self.capped_speed_up else None,
            "training_difference": self.training_difference.to_dict(),
            "time_speed_up": self.time_speed_up.to_dict() if self.time_speed_up else None,
            "own_schedule": self.own_schedule,
            **(
                {"test": self.test.to_dict(), "test_difference": self.test_difference.to_dict()}
                if self.test.values
                else {}
            ),
        }

    def _averaged(self) -> dict[str, Any]:
        if not self.averaged.values:
            return {}
        return {"averaged": self.averaged.to_dict(), "averaged_difference": self.averaged_difference.to_dict()}


def summarise(runs: list[RunResult], configs: dict[str, ModelConfig], context: int) -> list[Row]:
    """One row for each model of `configs`, the first of which is the baseline. Only finished runs count."""
    by_model = {name: sorted((r for r in runs if r.model == name), key=lambda r: r.seed) for name in configs}
    baseline = {run.seed: run for run in next(iter(by_model.values())) if run.finished}
    rows = [_row(name, configs[name], by_model[name], baseline, context) for name in configs]
    return [replace(row, own_schedule=bool(rows[0].steps and row.steps and row.steps != rows[0].steps)) for row in rows]


def _row(name: str, config: ModelConfig, every: list[RunResult], baseline: dict[int, RunResult], context: int) -> Row:
    runs = [run for run in every if run.finished]
    pairs = [(run, baseline[run.seed]) for run in runs if run.seed in baseline]
    steps, ratios = _faster([(ours.curve, theirs.curve) for ours, theirs in pairs])
    capped = [(_capped(ours), _capped(theirs)) for ours, theirs in pairs]
    training = [(ours.training, theirs.training) for ours, theirs in pairs]
    others = [f"{n} of {len(every)} {kind}" for kind in UNCOUNTED if (n := sum(run.status == kind for run in every))]
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
        averaged=_last(runs, "averaged"),
        averaged_difference=_difference([(_averaged(ours), _lower(theirs)) for ours, theirs in pairs]),
        difference=_difference([(ours.curve, theirs.curve) for ours, theirs in pairs]),
        steps_to_baseline=steps,
        speed_up=ratios,
        training_loss=Spread(tuple(run.training[-1][1] for run in runs if run.training)),
        training_speed_up=_faster(training)[1],
        tokens_per_second=Spread(tuple(s for run in runs if not math.isnan(s := run.tokens_per_second))),
        capped_loss=Spread(tuple(_capped(run)[-1][1] for run in runs)),
        capped_difference=_difference(capped),
        capped_speed_up=_faster(capped)[1],
        training_difference=_difference(training),
        time_speed_up=_in_time(ratios, pairs),
        tests=tuple(run.test for run in runs),
        test_difference=Spread(tuple(round(a.loss - b.loss, 6) for a, b in _tests(pairs))),
        averaged_test_difference=Spread(
            tuple(
                round(a.averaged - min(b.loss, b.averaged), 6)
                for a, b in _tests(pairs)
                if a.averaged is not None and b.averaged is not None
            )
        ),
        capped_test_difference=Spread(tuple(round(a.capped_loss - b.capped_loss, 6) for a, b in _tests(pairs))),
    )


def _tests(pairs: Sequence[tuple[RunResult, RunResult]]) -> list[tuple[Test, Test]]:
    """Of pairs of runs, their tests, where both have one."""
    return [(ours.test, theirs.test) for ours, theirs in pairs if ours.test and theirs.test]


def _last(runs: Sequence[RunResult], key: str) -> Spread:
    """One of the last held-out figures of runs, of those that have it."""
    return Spread(tuple(value for run in runs if (value := run.evaluation[-1].get(key)) is not None))


def _capped(run: RunResult) -> Curve:
    """Held-out loss with the capacity limits of training, by step."""
    return [(line["step"], line["loss"] + line.get("drop_gap", 0.0)) for line in run.evaluation]


def _averaged(run: RunResult) -> Curve:
    """Held-out loss of averaged weights, by step; empty without any."""
    return [(line["step"], line["averaged"]) for line in run.evaluation if "averaged" in line]


def _lower(run: RunResult) -> Curve:
    """The lower of two held-out losses, of weights and of their average, by step; empty without an average."""
    return [(line["step"], min(line["loss"], line["averaged"])) for line in run.evaluation if "averaged" in line]


def _difference(pairs: Sequence[tuple[Curve, Curve]]) -> Spread:
    """Last value of each curve minus that of its baseline."""
    return Spread(tuple(round(ours[-1][1] - theirs[-1][1], 6) for ours, theirs in pairs if ours and theirs))


def _in_time(ratios: Spread | None, pairs: Sequence[tuple[RunResult, RunResult]]) -> Spread | None:
    """Speed-ups in steps, times how many more tokens a second the runs read; None if a speed is unknown."""
    paces = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]
    if ratios is None or any(map(math.isnan, paces)):
        return None
    return Spread(tuple(ratio * pace for ratio, pace in zip(ratios.values, paces, strict=True)))


def _faster(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[tuple[float | None, ...], Spread | None]:
    """Steps of each curve to the last loss of its baseline, and how many times those of the baseline they are."""
    steps = tuple(crossing(ours, theirs[-1][1]) if theirs else None for ours, theirs in pairs)
    own = [crossing(theirs, theirs[-1][1]) if theirs else None for _, theirs in pairs]
    ratios = [theirs / ours for theirs, ours in zip(own, steps, strict=True) if theirs and ours]
    return steps, Spread(tuple(ratios)) if ratios and len(ratios) == len(pairs) else None


def paired(first: Row, second: Row, figure: str) -> Spread:
    """One figure of a row, such as "loss", minus another row's with the same seed; empty where they share none."""
    sides = (getattr(row, figure).values for row in (first, second))
    ours, theirs = (
        dict(zip(row.seeds, values, strict=True)) if len(values) == len(row.seeds) else {}
        for row, values in zip((first, second), sides, strict=True)
    )
    return Spread(tuple(value - theirs[seed] for seed, value in ours.items() if seed in theirs))
