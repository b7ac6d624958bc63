"""The charts of a comparison: loss and speed-up over tokens, loss by number of experts, routing."""

import re
import statistics
from collections.abc import Callable, Sequence

from ..results import Comparison, Curve, RunResult, smoothing, speed_up
from .chart import COLOURS, Chart, Line
from .wording import count


def curves(found: Comparison) -> list[Chart]:
    """Loss over tokens and over time, held-out and in training, and the speed-up over tokens."""
    rows, steps = found.rows, found.settings["steps"]
    runs = _finished(found)
    held_out = _lines(found, lambda run: run.curve)
    training = _lines(found, lambda run: run.training, dots=False)
    base = {run.seed: run for run in runs[rows[0].name]}
    others = {name: [run for run in own if run.seed in base] for name, own in runs.items() if name != rows[0].name}
    faster = [
        over_seeds(name, k, [_tokens(found, speed_up(base[r.seed].curve, r.curve)) for r in own])
        for k, (name, own) in enumerate(others.items(), start=1)
    ]
    pace = {row.name: 1 / row.tokens_per_second.mean for row in rows if row.tokens_per_second.values}
    timed = [
        Line(k.name, k.colour, [(x * pace[k.name], loss) for x, loss in k.points]) for k in held_out if k.name in pace
    ]
    target = (rows[0].loss.mean, f"{rows[0].name}'s final loss") if base else None
    begin = steps * found.step_tokens / 10
    window, alpha = _window(held_out, begin), smoothing(steps)
    return [
        Chart(
            "Held-out loss",
            "Held-out loss over tokens",
            held_out,
            "Mean over the seeds, and the band between the lowest and the highest.",
            y_range=window,
            y_label="nats per token",
            level=target,
        ),
        Chart(
            "Speed-up",
            "Speed-up over tokens",
            faster,
            "Tokens of the baseline over tokens of each model to the lowest held-out loss that the baseline had "
            "reached by then (the paper's appendix D).",
            y_range=_window([*faster, Line("", 0, [(begin, 1.0)])], begin),
            x_label="tokens of the baseline",
            y_label="times fewer tokens than the baseline",
            y_format="{:.2f}×".format,
            level=(1.0, ""),
        ),
        Chart(
            "Training loss",
            "Training loss over tokens",
            training,
            f"Language-model loss alone, exponential moving average with weight {alpha:.2g} a step.",
            y_range=_window(training, begin),
            y_label="nats per token",
        ),
        Chart(
            "Held-out loss over time",
            "Held-out loss over seconds of training",
            timed,
            "At each model's median speed on the machine named below: equal tokens are not equal time.",
            y_range=window,
            x_label="seconds",
            y_label="nats per token",
            level=target,
        ),
    ]


def sweeps(found: Comparison) -> list[Chart]:
    """Loss by number of experts, where several models are called NAME-N: here, and as the paper has it."""
    groups: dict[str, list[int]] = {}
    for row in found.rows:
        if match := re.fullmatch(r"([a-z]+)-(\d+)", row.name):
            groups.setdefault(match[1], []).append(int(match[2]))
    groups = {name: sorted(numbers) for name, numbers in groups.items() if len(numbers) > 1}
    if not groups:
        return []
    rows = {row.name: row for row in found.rows}
    numbers = sorted({n for own in groups.values() for n in own})
    size = {n: count(rows[f"{name}-{n}"].parameters.total) for name, own in groups.items() for n in own}
    printed = found.paper.printed if found.paper else {}
    baseline = found.rows[0].name
    lines = []
    for k, (name, own) in enumerate(groups.items()):
        here = [(numbers.index(n), rows[f"{name}-{n}"].difference) for n in own]
        here = [(x, difference) for x, difference in here if difference.values]
        low, high = ([(x, getattr(d, side)) for x, d in here] for side in ("low", "high"))
        lines.append(Line(f"{name}, here", k + 1, [(x, d.mean) for x, d in here], low, high))
        paper = [(numbers.index(n), loss) for n in own if (loss := printed.get(f"{name}-{n}")) is not None]
        if paper and baseline in printed:
            lines.append(Line(f"{name}, the paper", k + 1 + COLOURS, [(x, y - printed[baseline]) for x, y in paper]))
    return [
        Chart(
            "Loss by number of experts",
            "Loss by number of experts",
            lines,
            f"Final loss minus {baseline}'s: here held-out, with the seeds' range; the paper's is smoothed training "
            "loss. Below each number of experts are the total parameters.",
            y_label=f"nats per token above {baseline}",
            y_format=lambda nats: f"{nats:+.4f}".replace("-", "−"),
            level=(0.0, baseline),
            categories=[(f"{n}", size[n]) for n in numbers],
            keys=True,
        )
    ]


def routing(found: Comparison) -> list[Chart]:
    """Busiest experts and dropped choices over training, of the models that have routers."""

    def busiest(run: RunResult) -> Curve:
        return [(line["step"], max(max(layer["load"]) for layer in line["layers"])) for line in run.router]

    def dropped(run: RunResult) -> Curve:
        return [(line["step"], statistics.fmean(at["dropped"] for at in line["layers"])) for line in run.router]

    busy, drops = ([line for line in _lines(found, curve, dots=False) if line.points] for curve in (busiest, dropped))
    if not busy:
        return []
    drops = [line for line in drops if any(share > 0 for _, share in line.points)]
    charts = [
        Chart(
            "Busiest expert",
            "Load of the busiest expert over tokens",
            busy,
            "Of all layers, in times of its even share of the tokens.",
            y_range=_window([*busy, Line("", 0, [(0, 1.0)])], 0),
            y_label="times its even share",
            level=(1.0, ""),
        )
    ]
    if drops:
        caption = "Mean over layers of the share of choices beyond experts' capacity."
        title, form = "Choices dropped over tokens", "{:.2%}".format
        charts.append(Chart("Dropped", title, drops, caption, y_label="share of choices", y_format=form))
    return charts


def over_seeds(name: str, colour: int, curves: Sequence[Curve], *, dots: bool = True) -> Line:
    """The mean of several curves and the band between their extremes, where all of them have points."""
    at = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in at))) if at else []
    values = [[points[step] for points in at] for step in steps]
    low, high = ([(s, pick(v)) for s, v in zip(steps, values, strict=True)] for pick in (min, max))
    mean = [(s, statistics.fmean(v)) for s, v in zip(steps, values, strict=True)]
    return Line(name, colour, mean, low if len(at) > 1 else (), high if len(at) > 1 else (), dots)


def _finished(found: Comparison) -> dict[str, list[RunResult]]:
    return {row.name: [run for run in found.runs if run.model == row.name and run.finished] for row in found.rows}


def _lines(found: Comparison, curve: Callable[[RunResult], Curve], *, dots: bool = True) -> list[Line]:
    """A line over tokens for each model."""
    return [
        over_seeds(name, k, [_tokens(found, curve(run)) for run in runs], dots=dots)
        for k, (name, runs) in enumerate(_finished(found).items())
    ]


def _tokens(found: Comparison, curve: Curve) -> Curve:
    """A curve over steps as one over tokens."""
    return [(step * found.step_tokens, value) for step, value in curve]


def _window(lines: Sequence[Line], begin: float) -> tuple[float, float]:
    """The range of values after the beginning: the fall before it would flatten all the rest."""
    values = (
        [y for line in lines for x, y in line.points if x >= begin] or [y for x in lines for _, y in x.points] or [0]
    )
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin
