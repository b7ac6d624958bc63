"""The figures of a comparison, as HTML: loss and speed-up over tokens, loss by number of experts, routing."""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence

from ..results.comparison import Comparison, count
from ..results.history import Curve, smoothing, speed_up
from ..results.record import Run
from .chart import COLOURS, Line, line_chart, style
from .escaping import html


def curves(found: Comparison) -> list[str]:
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
        figure(
            "Held-out loss",
            line_chart(held_out, "Held-out loss over tokens", y_range=window, y_label="nats per token", level=target),
            "Mean over the seeds, and the band between the lowest and the highest.",
        ),
        figure(
            "Speed-up",
            line_chart(
                faster,
                "Speed-up over tokens",
                y_range=_window([*faster, Line("", 0, [(begin, 1.0)])], begin),
                x_label="tokens of the baseline",
                y_label="times fewer tokens than the baseline",
                y_format="{:.2f}×".format,
                level=(1.0, ""),
            ),
            "Tokens of the baseline over tokens of each model to the lowest held-out loss that the baseline had "
            "reached by then (the paper's appendix D).",
        ),
        figure(
            "Training loss",
            line_chart(
                training,
                "Training loss over tokens",
                y_range=_window(training, begin),
                y_label="nats per token",
            ),
            f"Language-model loss alone, exponential moving average with weight {alpha:.2g} a step.",
        ),
        figure(
            "Held-out loss over time",
            line_chart(
                timed,
                "Held-out loss over seconds of training",
                y_range=window,
                x_label="seconds",
                y_label="nats per token",
                level=target,
            ),
            "At each model's median speed on the machine named below: equal tokens are not equal time.",
        ),
    ]


def sweeps(found: Comparison) -> list[str]:
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
    drawing = line_chart(
        lines,
        "Loss by number of experts",
        y_label=f"nats per token above {baseline}",
        y_format=lambda nats: f"{nats:+.4f}".replace("-", "−"),
        level=(0.0, baseline),
        categories=[(f"{n}", size[n]) for n in numbers],
    )
    caption = (
        f"Final loss minus {baseline}'s: here held-out, with the seeds' range; the paper's is smoothed training loss. "
        "Below each number of experts are the total parameters."
    )
    return [figure("Loss by number of experts", legend((line.colour, line.name) for line in lines) + drawing, caption)]


def routing(found: Comparison) -> list[str]:
    """Busiest experts and dropped choices over training, of the models that have routers."""

    def busiest(run: Run) -> Curve:
        return [(line["step"], max(max(layer["load"]) for layer in line["layers"])) for line in run.router]

    def dropped(run: Run) -> Curve:
        return [(line["step"], statistics.fmean(at["dropped"] for at in line["layers"])) for line in run.router]

    busy, drops = ([line for line in _lines(found, curve, dots=False) if line.points] for curve in (busiest, dropped))
    if not busy:
        return []
    drops = [line for line in drops if any(share > 0 for _, share in line.points)]
    figures = [
        figure(
            "Busiest expert",
            line_chart(
                busy,
                "Load of the busiest expert over tokens",
                y_range=_window([*busy, Line("", 0, [(0, 1.0)])], 0),
                y_label="times its even share",
                level=(1.0, ""),
            ),
            "Of all layers, in times of its even share of the tokens.",
        )
    ]
    if drops:
        drawing = line_chart(drops, "Choices dropped over tokens", y_label="share of choices", y_format="{:.2%}".format)
        figures.append(figure("Dropped", drawing, "Mean over layers of the share of choices beyond experts' capacity."))
    return figures


def figure(title: str, drawing: str, caption: str) -> str:
    """A drawing with its name and what it shows; the name is no heading, as figures stand on several levels."""
    return f"<figure><p class='name'>{html(title)}</p>{drawing}<figcaption>{html(caption)}</figcaption></figure>"


def legend(names: Iterable[tuple[int, str]]) -> str:
    """Names of lines by their colour."""
    items = "".join(f"<li><i class='{style(index)}'></i>{html(name)}</li>" for index, name in names)
    return f"<ul class='legend'>{items}</ul>"


def over_seeds(name: str, colour: int, curves: Sequence[Curve], *, dots: bool = True) -> Line:
    """The mean of several curves and the band between their extremes, where all of them have points."""
    at = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in at))) if at else []
    values = [[points[step] for points in at] for step in steps]
    low, high = ([(s, pick(v)) for s, v in zip(steps, values, strict=True)] for pick in (min, max))
    mean = [(s, statistics.fmean(v)) for s, v in zip(steps, values, strict=True)]
    return Line(name, colour, mean, low if len(at) > 1 else (), high if len(at) > 1 else (), dots)


def _finished(found: Comparison) -> dict[str, list[Run]]:
    return {row.name: [run for run in found.runs if run.model == row.name and run.finished] for row in found.rows}


def _lines(found: Comparison, curve: Callable[[Run], Curve], *, dots: bool = True) -> list[Line]:
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
