"""Comparisons as one HTML page that needs nothing else: no scripts, no network, light or dark, phone or desk."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..reading import to_dict
from .figures import curves, legend, routing, sweeps
from .maps import maps
from .results import Comparison
from .section import Grid, Section, section


def report(comparisons: Sequence[Comparison]) -> str:
    """The page: a section for each comparison, and of a single one the maps of its routers too."""
    if len(comparisons) == 1:
        said = section(comparisons[0])
        header = f"<header><h1>{escape(said.title)}</h1>{_lead(said)}</header>"
        return _page(f"moemamba: {said.title}", header + _section(said, comparisons[0]) + "".join(maps(comparisons[0])))
    sections = [section(found) for found in comparisons]
    links = "".join(f"<li><a href='#{k}'>{escape(said.title)}</a></li>" for k, said in enumerate(sections))
    body = [f"<header><h1>{len(sections)} comparisons</h1><ol>{links}</ol></header>"]
    for k, (said, found) in enumerate(zip(sections, comparisons, strict=True)):
        body.append(f"<section><h2 id='{k}'>{escape(said.title)}</h2>{_lead(said)}{_section(said, found)}</section>")
    return _page("moemamba: " + ", ".join(said.title for said in sections), "".join(body))


def _page(title: str, body: str) -> str:
    """A complete HTML document."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _lead(said: Section) -> str:
    return f"<ul class='lead'>{''.join(f'<li>{escape(line)}</li>' for line in said.lead)}</ul>"


def _section(said: Section, found: Comparison) -> str:
    """Words and tables, figures, and how it was made."""
    parts = [f"<h3>{escape(heading)}</h3>{''.join(map(_block, blocks))}" for heading, blocks in said.parts]
    names = legend(enumerate(row.name for row in found.rows))
    drawings = "".join([*curves(found), *sweeps(found), *routing(found)])
    parts.insert(3 if found.paper else 2, f"<h3>Figures</h3>{names}<div class='grid'>{drawings}</div>")
    return "".join([*parts, *_how(found)])


def _block(block: str | Grid) -> str:
    return _table(block) if isinstance(block, Grid) else f"<p>{escape(block)}</p>"


def _table(grid: Grid) -> str:
    """An HTML table that scrolls sideways where it must."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    """A figure, the range of its seeds below it."""
    figure, opened, span = text.partition(" (")
    return f"{escape(figure)}<small>({escape(span)}</small>" if opened and "…" in span else escape(text)


def _how(found: Comparison) -> list[str]:
    settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in _settings(found).items())
    machine = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in found.environment.items())
    configs = [(row.name, json.dumps(to_dict(row.config), indent=2)) for row in found.rows]
    models = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(config)}</pre></details>" for name, config in configs
    )
    command = f"<pre>{escape(found.command)}</pre>" if found.command else "<p>Made from Python.</p>"
    return [
        f"<h3>How it was made</h3>{command}<details><summary>Settings, machine and models</summary><div class='grid'>",
        f"<div><h4>Shared settings</h4><dl>{settings}</dl></div>",
        f"<div><h4>Machine</h4><dl>{machine}</dl><h4>Models</h4>{models}</div></div></details>",
    ]


def _settings(found: Comparison) -> dict[str, Any]:
    """What all runs share, and where models have their own, that."""
    settings = dict(found.settings)
    for name, value in settings.items():
        if own := {model: recipe[name] for model, recipe in found.recipes.items() if name in recipe}:
            settings[name] = f"{value}; {', '.join(f'{model}: {one}' for model, one in own.items())}"
    return settings
