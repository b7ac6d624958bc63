"""Comparisons as markdown: the words and tables of their pages, for documents and terminals."""

import re
from collections.abc import Sequence

from ..results import Comparison
from .escaping import markdown_text
from .section import Grid, section


def markdown(comparisons: Sequence[Comparison]) -> str:
    """One section each."""
    return "\n".join(line for found in comparisons for line in _section(found)).rstrip("\n") + "\n"


def _section(found: Comparison) -> list[str]:
    said = section(found)
    lines = [f"# {markdown_text(said.title)}", "", *map(markdown_text, said.lead), ""]
    for heading, blocks in said.parts:
        lines += [f"## {markdown_text(heading)}", ""]
        for block in blocks:
            lines += [*(_grid(block) if isinstance(block, Grid) else [markdown_text(block)]), ""]
    return [
        *lines,
        markdown_text("Machine: " + ", ".join(f"{k} {v}" for k, v in found.environment.items()) + "."),
        "",
        *_command(said.command),
    ]


def _command(command: str | None) -> list[str]:
    """As code where nothing in it could end the code or be markup; else as a line of text."""
    if not command:
        return []
    plain = not re.search(r"[<`&\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", command)
    return [f"    {command}" if plain else f"Command: {markdown_text(command)}", ""]


def _grid(grid: Grid) -> list[str]:
    rows = [[markdown_text(cell) for cell in row] for row in (grid.header, *grid.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(grid.header), *rows[1:])]
