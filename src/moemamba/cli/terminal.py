"""What the commands share: reading arguments into a dataclass, printing a table, saying what an interruption left."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from ..host.terminal import display, say, visible
from .options import options, read

Arguments = TypeVar("Arguments")
WIDTH = 120  # characters of a table where there is no terminal
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


def show(rows: Iterable[Sequence[str]], header: Sequence[str] = (), least: Iterable[str] = ()) -> list[str]:
    """Print a table: ruled on a terminal, plain columns elsewhere. Columns of figures lie right, words left.

    Args:
        least: columns that are left out one by one, in this order, while the table is wider than the terminal, or than
            WIDTH where there is none.
    Returns:
        those that were left out, in the order of the header.
    """
    lines = [[visible(cell, line=True) for cell in row] for row in [*([header] if header else []), *rows]]
    columns = [[str(cell) for cell in column] for column in zip(*lines, strict=True)]
    ruled = display().isatty()
    gap = 3 if ruled else 2
    room = width() + gap
    left_out: set[str] = set()
    for name in least:
        if sum(max(map(len, column)) + gap for column in columns) <= room:
            break
        left_out.add(name)
        columns = [column for column in columns if column[0] != name]
    body = [column[1:] if header else column for column in columns]
    right = [all(cell[:1] in "0123456789<>−+–× " for cell in column) for column in body]
    if ruled:
        _ruled(list(zip(*body, strict=True)), [column[0] for column in columns] if header else (), right)
    else:
        for cells in zip(*map(_aligned, columns, right), strict=True):
            _print("  ".join(cells).rstrip())
    return [name for name in header if name in left_out]


def _aligned(column: Sequence[str], right: bool) -> list[str]:
    room = max(map(len, column))
    return [cell.rjust(room) if right else cell.ljust(room) for cell in column]


def width() -> int:
    """Characters of a line: those of the terminal, WIDTH where there is none."""
    return shutil.get_terminal_size((WIDTH, 0)).columns if display().isatty() else WIDTH


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
