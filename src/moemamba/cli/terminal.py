"""What the commands share: reading arguments into a dataclass, printing a table, saying what an interruption left."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], arguments: Sequence[str], command: str, default: Arguments | None = None) -> Arguments:
    """The dataclass of a command from its arguments; leaves with status 2, saying why, if they do not fit."""
    missing = tyro.MISSING_NONPROP if default is None else default
    options = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=arguments, prog=f"moemamba {command}", config=options, default=missing)


def show(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a table: ruled on a terminal, plain columns elsewhere. Columns of figures lie right, words left."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True))
    right = [all(cell[:1] in "0123456789<>−+–× " for cell in column) for column in columns]
    if sys.stdout.isatty():
        table = Table(box=box.SIMPLE_HEAD, show_header=bool(header), pad_edge=False)
        for index, flush_right in enumerate(right):
            table.add_column(header[index] if header else "", justify="right" if flush_right else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if flush_right else cell.ljust(width)
            for cell, width, flush_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def stopped(place: Path, command: str) -> None:
    """Say what an interruption leaves below a directory, and which command goes on from it."""
    saved = sorted(place.rglob("checkpoints/[0-9]*"), key=lambda checkpoint: checkpoint.stat().st_mtime)
    what = f"{saved[-1]} is saved" if saved else "nothing was saved yet"
    print(f"\nstopped; {what}. Go on with: {command}", file=sys.stderr)
