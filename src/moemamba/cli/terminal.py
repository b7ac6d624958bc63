"""What the commands share: reading arguments into a dataclass, printing a table, saying what an interruption left."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from ..host.terminal import display, say, visible
from .options import options, read

Arguments = TypeVar("Arguments")
NAMES = "--option-names"  # asks a command for the names of its options, for the completion of shells


def parse(
    kind: type[Arguments],
    arguments: Sequence[str],
    command: str,
    default: Arguments | None = None,
) -> Arguments:
    """The dataclass of a command from its arguments; prints its help, and leaves, where that is asked for.

    Raises:
        ValueError: an argument that does not fit.
    """
    if {"-h", "--help", "--help-all"} & set(arguments):
        from .help import page

        print(page(kind, command, default, "--help-all" in arguments))
        sys.exit(0)
    if NAMES in arguments:
        print("\n".join(option.name for option in options(kind, default) if not option.positional))
        sys.exit(0)
    return read(kind, arguments, command, default)


def show(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a table: ruled on a terminal, plain columns elsewhere. Columns of figures lie right, words left."""
    rows = [[visible(cell, line=True) for cell in row] for row in rows]
    header = [visible(cell, line=True) for cell in header]
    columns = list(zip(*rows, strict=True))
    right = [all(cell[:1] in "0123456789<>−+–× " for cell in column) for column in columns]
    if display().isatty():
        _ruled(rows, header, right)
        return
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if flush_right else cell.ljust(width)
            for cell, width, flush_right in zip(line, widths, right, strict=True)
        ]
        _print("  ".join(cells).rstrip())


def _ruled(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=bool(header), pad_edge=False)
    for index, flush_right in enumerate(right):
        table.add_column(Text(header[index]) if header else "", justify="right" if flush_right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=cast(TextIO, display(needed=True))).print(table)


def show_json(values: Any) -> None:
    """Print one JSON object, indented: what `--json` answers."""
    _print(json.dumps(values, indent=2))


def line(text: str, apart: bool = False) -> None:
    """Print a line that may hold names: control characters in it are shown, not obeyed. `apart`: below an empty one."""
    if apart:
        _print("")
    _print(visible(text, line=True))


def _print(text: str) -> None:
    print(text, file=display(needed=True))


def stopped(place: Path, command: str) -> None:
    """Say what an interruption leaves below a directory, and which command goes on from it."""
    saved = sorted(place.rglob("checkpoints/[0-9]*"), key=lambda checkpoint: checkpoint.stat().st_mtime)
    what = f"{saved[-1]} is saved" if saved else "nothing was saved yet"
    say(f"\nstopped; {what}. Go on with: {visible(command, line=True)}")
