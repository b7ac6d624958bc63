"""A comparison as one HTML page that needs nothing else: no scripts, no network, light or dark, phone or desk."""

import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..config import to_dict
from .chart import Line, heat_map, line_chart
from .history import Curve, smoothed, speed_up
from .results import HEADER, Comparison, Row, cells, signed

SERIES = 8  # colours that report.css has


def report(comparison: Comparison) -> str:
    """The page."""
    rows, settings = comparison.rows, comparison.settings
    names = [row.name for row in rows]
    seeds = len({run.seed for run in comparison.runs})
    tokens = settings["steps"] * settings["batch_size"] * settings["context"]
    budget = (
        f"Every model saw the same {tokens:,} tokens in the same order: {settings['steps']:,} steps of "
        f"{settings['batch_size']} × {settings['context']} tokens, {_seeds(seeds)}. Data: {settings['data']}."
    )
    body = [
        f"<header><h1>{escape(' · '.join(names))}</h1><p class='lead'>{' '.join(map(headline, rows[1:]))}</p>",
        f"<p>{escape(budget)}</p></header>",
        "<h2>Results</h2>",
        table(HEADER, cells(rows, settings["steps"])),
        f"<p class='note'>{escape(notes(seeds))}</p>",
        "<h2>Curves</h2>",
        _legend(enumerate(names)),
        "<div class='grid'>",
        *_curves(comparison),
        "</div>",
        *_routing(comparison),
        *_how(comparison),
    ]
    return page("moemamba: " + " · ".join(names), "".join(body))


def page(title: str, body: str) -> str:
    """A complete HTML document in the report's style."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def headline(row: Row) -> str:
    """One sentence on how a model stands to the baseline, as HTML."""
    d, name = row.difference, f"<b>{escape(row.name)}</b>"
    if row.missing or not d.values:
        return f"{name}: {escape(row.verdict)}."
    if not row.verdict.startswith(("lower", "higher")) and d.std is not None:
        return f"{name} shows no clear difference from the baseline: {signed(d)} nats per token."
    side = "below" if d.mean < 0 else "above"
    text = f"{name} ends {abs(d.mean):.3f} nats per token {side} the baseline ({row.verdict})"
    if row.speed_up and d.mean < 0:
        text += f" and reaches its final loss in {row.speed_up.mean:.2f}× fewer steps"
    return text + "."


def notes(seeds: int) -> str:
    """What the table's figures mean, to stand under it."""
    spread = f"mean ± standard deviation, {seeds} seeds" if seeds > 1 else "one seed, so its spread is unknown"
    paired = " (lowest … highest)" if seeds > 1 else ""
    return (
        f"Held-out loss in nats per token at the last step, without auxiliary losses or dropping: {spread}. "
        f"Differences are paired by seed: same batches, same order{paired}. Steps to the baseline's "
        "final loss are interpolated on the held-out curve; the speed-up is the baseline's steps over them. Parameters "
        "are without embedding and head."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways where it must."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def over_seeds(name: str, colour: int, curves: Sequence[Curve], *, dots: bool = True) -> Line:
    """The mean of several curves and the band between their extremes, where all of them have points."""
    at = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in at))) if at else []
    values = [[points[step] for points in at] for step in steps]
    low, high = ([(s, pick(v)) for s, v in zip(steps, values, strict=True)] for pick in (min, max))
    mean = [(s, statistics.fmean(v)) for s, v in zip(steps, values, strict=True)]
    return Line(name, colour % SERIES, mean, low if len(at) > 1 else (), high if len(at) > 1 else (), dots)


def _curves(comparison: Comparison) -> list[str]:
    rows, steps = comparison.rows, comparison.settings["steps"]
    by_model = {row.name: [r for r in comparison.runs if r.model == row.name and r.finished] for row in rows}
    held_out = [over_seeds(name, k, [r.curve for r in runs]) for k, (name, runs) in enumerate(by_model.items())]
    span = max(1, len(comparison.runs[0].history.train) // 20)
    training = [
        over_seeds(name, k, [smoothed(r.history.curve("train", "loss"), span) for r in runs], dots=False)
        for k, (name, runs) in enumerate(by_model.items())
    ]
    base = {run.seed: run for run in next(iter(by_model.values()))}
    faster = [
        over_seeds(name, k, [speed_up(base[r.seed].curve, r.curve) for r in runs if r.seed in base])
        for k, (name, runs) in enumerate(by_model.items())
    ]
    step_tokens = comparison.settings["batch_size"] * comparison.settings["context"]
    pace = {row.name: step_tokens / row.tokens_per_second.mean for row in rows}
    timed = [Line(k.name, k.colour, [(step * pace[k.name], loss) for step, loss in k.points]) for k in held_out]
    target = (rows[0].loss.mean, f"{rows[0].name}'s final loss") if base else None
    window = _window(held_out, steps)
    return [
        figure(
            "Held-out loss",
            line_chart(held_out, "Held-out loss over steps", y_range=window, y_label="nats per token", level=target),
            "Mean over the seeds, and the band between the lowest and the highest.",
        ),
        figure(
            "Training loss",
            line_chart(
                training, "Training loss over steps", y_range=_window(training, steps), y_label="nats per token"
            ),
            f"Language-model loss alone, exponential moving average over {span} records.",
        ),
        figure(
            "Speed-up in steps",
            line_chart(
                faster,
                "Speed-up over steps",
                y_label="times",
                y_format="{:.2f}×".format,
            ),
            "Steps of the baseline over steps of each model to the lowest loss that the baseline had reached by then.",
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
            "The same at each model's median speed on the machine named below: equal steps are not equal time.",
        ),
    ]


def _window(lines: Sequence[Line], steps: int) -> tuple[float, float]:
    """The range of losses after the first tenth of training: the fall before it would flatten all the rest."""
    values = (
        [y for line in lines for x, y in line.points if x >= steps / 10]
        or [y for x in lines for _, y in x.points]
        or [0]
    )
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _routing(comparison: Comparison) -> list[str]:
    runs = [run for run in comparison.runs if run.history.router]
    if not runs:
        return []
    parts = [
        "<h2>Routing</h2><p>Each map shows one layer's experts from top to bottom and training from left to right. "
        "<span class='key cool'>Blue</span> experts get less than their even share of the tokens, "
        "<span class='key warm'>orange</span> ones more; full colour is a quarter or four times of it.</p>",
        _legend(enumerate(("router's entropy (of its maximum)", "choices dropped", "dead experts"), start=1)),
    ]
    for index, run in enumerate(runs):
        opened = " open" if index == 0 or run.model != runs[index - 1].model else ""
        gap = run.history.evaluation[-1].get("drop_gap") if run.history.evaluation else None
        limits = (
            "" if gap is None else f"; the capacity limits of training would add {gap:+.4f} nats to its held-out loss"
        )
        summary = f"{escape(run.model)}, seed {run.seed}{limits}"
        parts.append(f"<details{opened}><summary>{summary}</summary><div class='grid'>")
        layers = range(len(run.history.router[-1]["layers"]))
        parts += [_layer([(line["step"], line["layers"][k]) for line in run.history.router]) for k in layers]
        parts.append("</div></details>")
    return parts


def _layer(lines: list[tuple[float, dict[str, Any]]]) -> str:
    """One router over training: the map of its load, and its entropy, drops and dead experts."""
    last, experts = lines[-1][1], len(lines[-1][1]["load"])
    name = last["name"]
    bins = [lines[k : k + -(-len(lines) // 120)] for k in range(0, len(lines), -(-len(lines) // 120))]
    load = [[experts * statistics.fmean(at["load"][e] for _, at in part) for part in bins] for e in range(experts)]
    tips = [
        f"expert {e}: {row[-1]:.2f} times its even share at the end, {min(row):.2f} to {max(row):.2f} over training"
        for e, row in enumerate(load)
    ]
    shares = [
        Line("entropy", 1, [(step, at["entropy"] / at["max_entropy"]) for step, at in lines], dots=False),
        Line("dropped", 2, [(step, at["dropped"]) for step, at in lines], dots=False),
        Line("dead experts", 3, [(step, at["dead"] / experts) for step, at in lines], dots=False),
    ]
    ends = [row[-1] for row in load]
    caption = (
        f"At the end: busiest expert {max(ends):.2f}×, idlest {min(ends):.2f}× its even share; entropy "
        f"{last['entropy'] / last['max_entropy']:.0%} of its maximum; {last['dropped']:.1%} dropped; {last['dead']} of "
        f"{experts} dead; balance loss {last['balance']:.2f} (even is 1)."
    )
    steps = [part[-1][0] for part in bins]
    drawing = heat_map(load, steps, f"Load of the experts of {name}", tips)
    drawing += line_chart(shares, f"Shares of {name}", y_range=(0, 1), y_label="share", height=130)
    return figure(name, drawing, caption)


def _how(comparison: Comparison) -> list[str]:
    settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in comparison.settings.items())
    machine = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in comparison.environment.items())
    configs = [(row.name, json.dumps(to_dict(row.config), indent=2)) for row in comparison.rows]
    models = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(config)}</pre></details>" for name, config in configs
    )
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else "<p>Made from Python.</p>"
    return [
        f"<h2>How it was made</h2>{command}<div class='grid'>",
        f"<section><h3>Shared settings</h3><dl>{settings}</dl></section>",
        f"<section><h3>Machine</h3><dl>{machine}</dl><h3>Models</h3>{models}</section></div>",
    ]


def _legend(names: Iterable[tuple[int, str]]) -> str:
    items = "".join(f"<li><i class='s{index % SERIES}'></i>{escape(name)}</li>" for index, name in names)
    return f"<ul class='legend'>{items}</ul>"


def _seeds(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds != 1 else ''}"
