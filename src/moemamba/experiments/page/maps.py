"""Maps of each expert's load over training, layer by layer, as HTML."""

import math
import statistics
from typing import Any

from ..results.comparison import Comparison
from .chart import Line, heat_map, line_chart
from .escaping import html
from .figures import figure, legend


def maps(comparison: Comparison) -> list[str]:
    """Of every run that has routers, for a page of its own; folded away but for the first of each model."""
    runs = [run for run in comparison.runs if run.router]
    if not runs:
        return []
    parts = [
        "<h2>Load of the experts</h2><p>Each map shows one layer's experts from top to bottom and training from left "
        "to right. <span class='key cool'>Blue</span> experts get less than their even share of the tokens, "
        "<span class='key warm'>orange</span> ones more; full colour is a quarter or four times of it.</p>",
        legend(enumerate(("router's entropy (of its maximum)", "choices dropped", "dead experts"), start=1)),
    ]
    for index, run in enumerate(runs):
        opened = " open" if index == 0 or run.model != runs[index - 1].model else ""
        gap = run.evaluation[-1].get("drop_gap") if run.evaluation else None
        limits = (
            "" if gap is None else f"; the capacity limits of training would add {gap:+.4f} nats to its held-out loss"
        )
        summary = html(f"{run.model}, seed {run.seed}{limits}")
        parts.append(f"<details{opened}><summary>{summary}</summary><div class='grid'>")
        layers = range(len(run.router[-1]["layers"]))
        parts += [_layer([(line["step"], line["layers"][k]) for line in run.router]) for k in layers]
        parts.append("</div></details>")
    return parts


def _layer(lines: list[tuple[float, dict[str, Any]]]) -> str:
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
    drawing = heat_map(load, steps, f"Load of the experts of {name}", tips)
    drawing += line_chart(shares, f"Shares of {name}", y_range=(0, 1), x_label="steps", y_label="share", height=130)
    return figure(name, drawing, caption)
