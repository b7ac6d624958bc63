"""Comparisons as one HTML page that needs nothing else: no scripts, no network, light or dark, phone or desk."""

import json
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

from ...reading import to_dict
from ..results import Comparison
from .chart import Chart
from .escaping import html
from .figures import curves, routing, sweeps
from .maps import maps
from .section import Grid, Section, section
from .svg import heat_map, line_chart, style

FAILED = "Figures that could not be drawn"


def html_page(comparisons: Sequence[Comparison]) -> str:
    """The page: a section for each comparison, and of a single one the maps of its routers too."""
    if len(comparisons) == 1:
        said = section(comparisons[0])
        header = f"<header><h1>{html(said.title)}</h1>{_lead(said)}</header>"
        shown = _drawn(_maps, comparisons[0])
        return document(f"moemamba: {said.title}", header + _section(said, comparisons[0], "h2") + "".join(shown))
    sections = [section(found) for found in comparisons]
    links = "".join(f"<li><a href='#{k}'>{html(said.title)}</a></li>" for k, said in enumerate(sections))
    body = [f"<header><h1>{len(sections)} comparisons</h1><ol>{links}</ol></header>"]
    for k, (said, found) in enumerate(zip(sections, comparisons, strict=True)):
        body.append(
            f"<section><h2 id='{k}'>{html(said.title)}</h2>{_lead(said)}{_section(said, found, 'h3')}</section>"
        )
    return document("moemamba: " + ", ".join(said.title for said in sections), "".join(body))


def document(title: str, body: str) -> str:
    """A complete HTML document."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _lead(said: Section) -> str:
    return f"<ul class='lead'>{''.join(f'<li>{html(line)}</li>' for line in said.lead)}</ul>"


def _section(said: Section, found: Comparison, level: str) -> str:
    """Words and tables, figures, and how it was made, under headings of a level: none is skipped."""
    parts = [f"<{level}>{html(heading)}</{level}>{''.join(map(_block, blocks))}" for heading, blocks in said.parts]
    names = _legend(enumerate(row.name for row in found.rows))
    drawings = "".join(drawn for make in (curves, sweeps, routing) for drawn in _drawn(_figures(make), found))
    parts.insert(3 if found.paper else 2, f"<{level}>Figures</{level}>{names}<div class='grid'>{drawings}</div>")
    return "".join([*parts, *_how(found, level)])


def _drawn(draw: Callable[[Comparison], list[str]], found: Comparison) -> list[str]:
    """Figures, or a line that says why there are none: words and tables are not lost with them."""
    try:
        return draw(found)
    except Exception as error:
        return [f"<p class='note'>{FAILED}: {html(type(error).__name__)} {html(error)}</p>"]


def _figures(make: Callable[[Comparison], list[Chart]]) -> Callable[[Comparison], list[str]]:
    """What draws the charts that a function makes of a comparison."""
    return lambda found: [_chart(chart) for chart in make(found)]


def _chart(chart: Chart) -> str:
    """A chart as a figure, with a legend of its own if it needs one."""
    keys = _legend((line.colour, line.name) for line in chart.lines) if chart.keys else ""
    return _figure(chart.name, keys + line_chart(chart), chart.caption)


def _maps(found: Comparison) -> list[str]:
    """Load of the experts in every run, folded away but for the first of each model."""
    runs = maps(found)
    if not runs:
        return []
    parts = [
        "<h2>Load of the experts</h2><p>Each map shows one layer's experts from top to bottom and training from left "
        "to right. <span class='key cool'>Blue</span> experts get less than their even share of the tokens, "
        "<span class='key warm'>orange</span> ones more; full colour is a quarter or four times of it.</p>",
        _legend(enumerate(("router's entropy (of its maximum)", "choices dropped", "dead experts"), start=1)),
    ]
    for index, (run, layers) in enumerate(runs):
        opened = " open" if index == 0 or run.model != runs[index - 1][0].model else ""
        gap = run.evaluation[-1].get("drop_gap") if run.evaluation else None
        limits = (
            "" if gap is None else f"; the capacity limits of training would add {gap:+.4f} nats to its held-out loss"
        )
        summary = html(f"{run.model}, seed {run.seed}{limits}")
        parts.append(f"<details{opened}><summary>{summary}</summary><div class='grid'>")
        parts += [_figure(layer.name, heat_map(layer) + line_chart(layer.shares), layer.caption) for layer in layers]
        parts.append("</div></details>")
    return parts


def _figure(title: str, drawing: str, caption: str) -> str:
    """A drawing with its name and what it shows; the name is no heading, as figures stand on several levels."""
    return f"<figure><p class='name'>{html(title)}</p>{drawing}<figcaption>{html(caption)}</figcaption></figure>"


def _legend(names: Iterable[tuple[int, str]]) -> str:
    """Names of lines by their colour."""
    items = "".join(f"<li><i class='{style(index)}'></i>{html(name)}</li>" for index, name in names)
    return f"<ul class='legend'>{items}</ul>"


def _block(block: str | Grid) -> str:
    return _table(block) if isinstance(block, Grid) else f"<p>{html(block)}</p>"


def _table(grid: Grid) -> str:
    """An HTML table that scrolls sideways where it must, by keys too; on a phone a line says so."""
    head = "".join(f"<th>{html(cell)}</th>" for cell in grid.header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    scroll = "tabindex='0' role='region' aria-label='Table'"
    wide = len(grid.header) > 3  # else its lines may break
    hint = "<p class='hint' aria-hidden='true'>scrolls sideways →</p>" if wide else ""
    table = "<table>" if wide else "<table class='words'>"
    return f"{hint}<div class='wide' {scroll}>{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _code(text: str) -> str:
    return f"<pre tabindex='0'>{html(text)}</pre>"


def _cell(text: str) -> str:
    """A figure, the range of its seeds below it."""
    figure, opened, span = text.partition(" (")
    return f"{html(figure)}<small>({html(span)}</small>" if opened and "…" in span else html(text)


def _how(found: Comparison, level: str) -> list[str]:
    settings = "".join(f"<dt>{html(k)}</dt><dd>{html(v)}</dd>" for k, v in _settings(found).items())
    machine = "".join(f"<dt>{html(k)}</dt><dd>{html(v)}</dd>" for k, v in found.environment.items())
    configs = [(row.name, json.dumps(to_dict(row.config), indent=2)) for row in found.rows]
    models = "".join(f"<details><summary>{html(name)}</summary>{_code(config)}</details>" for name, config in configs)
    command = _code(found.command) if found.command else "<p>Made from Python.</p>"
    return [
        f"<{level}>How it was made</{level}>{command}",
        "<details><summary>Settings, machine and models</summary><div class='grid'>",
        f"<div><p class='name'>Shared settings</p><dl>{settings}</dl></div>",
        f"<div><p class='name'>Machine</p><dl>{machine}</dl><p class='name'>Models</p>{models}</div></div></details>",
    ]


def _settings(found: Comparison) -> dict[str, Any]:
    """What all runs share, and where models have their own, that."""
    settings = {name: "none" if value == {} else value for name, value in found.settings.items()}
    for name, value in settings.items():
        if own := {model: recipe[name] for model, recipe in found.recipes.items() if name in recipe}:
            settings[name] = f"{value}; {', '.join(f'{model}: {one}' for model, one in own.items())}"
    return settings
