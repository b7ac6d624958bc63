"""Maps of each expert's load over training, layer by layer."""

import math
import statistics
from typing import Any

from ..results import Comparison, RunResult
from .chart import Chart, Line, LoadMap


def maps(found: Comparison) -> list[tuple[RunResult, list[LoadMap]]]:
    """Of every run that has routers, a map of each."""
    return [
        (run, [_layer([(line["step"], line["layers"][k]) for line in run.router]) for k, _ in enumerate(layers)])
        for run in found.runs
        if run.router
        for layers in [run.router[-1]["layers"]]
    ]


def _layer(lines: list[tuple[float, dict[str, Any]]]) -> LoadMap:
    """One router over training: the map of its load, and its entropy, drops and dead experts."""
    last, experts = lines[-1][1], len(lines[-1][1]["load"])
    name, most = last["name"], math.log(experts) or 1.0
    bins = [lines[k : k + -(-len(lines) // 120)] for k in range(0, len(lines), -(-len(lines) // 120))]
    load = [[statistics.fmean(at["load"][e] for _, at in part) for part in bins] for e in range(experts)]
    tips = [
        f"expert {e}: {row[-1]:.2f} times its even share at the end, {min(row):.2f} to {max(row):.2f} over training"
        for e, row in enumerate(load)
    ]
    shares = [
        Line("entropy", 1, [(step, at["entropy"] / most) for step, at in lines], dots=False),
        Line("dropped", 2, [(step, at["dropped"]) for step, at in lines], dots=False),
        Line("dead experts", 3, [(step, at["dead"] / experts) for step, at in lines], dots=False),
    ]
    ends = [row[-1] for row in load]
    caption = (
        f"At the end: busiest expert {max(ends):.2f}×, idlest {min(ends):.2f}× its even share; entropy "
        f"{last['entropy'] / most:.0%} of its maximum; {last['dropped']:.1%} dropped; {last['dead']} of "
        f"{experts} dead; balance loss {last['balance']:.2f} (even is 1)."
    )
    steps = [part[-1][0] for part in bins]
    chart = Chart(
        f"Shares of {name}", f"Shares of {name}", shares, y_range=(0, 1), x_label="steps", y_label="share", height=130
    )
    return LoadMap(name, f"Load of the experts of {name}", load, steps, tips, chart, caption)
