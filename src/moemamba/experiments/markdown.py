"""Comparisons as markdown: the words and tables of their pages, for documents and terminals."""

from collections.abc import Sequence

from .results import Comparison
from .section import Grid, section


def markdown(comparisons: Sequence[Comparison]) -> str:
    """One section each."""
    return "\n".join(line for found in comparisons for line in _section(found)).rstrip("\n") + "\n"


def _section(found: Comparison) -> list[str]:
    said = section(found)
    lines = [f"# {said.title}", "", *said.lead, ""]
    for heading, blocks in said.parts:
        lines += [f"## {heading}", ""]
        for block in blocks:
            lines += [*(_grid(block) if isinstance(block, Grid) else [block]), ""]
    return [
        *lines,
        "Machine: " + ", ".join(f"{k} {v}" for k, v in found.environment.items()) + ".",
        "",
        *_command(said.command),
    ]


def _command(command: str | None) -> list[str]:
    return [f"    {command}", ""] if command else []


def _grid(grid: Grid) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (grid.header, ["---"] * len(grid.header), *grid.rows)]
