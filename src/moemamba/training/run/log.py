"""metrics.jsonl: what happened in a run, a line each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...host.files import check_regular, replacing, writing
from ..watch import Board, Watcher

LINE_LIMIT = 1 << 26
"""bytes of a line"""


class Log:
    """The file, and what shows it: `log("note", step=3, text="...")` appends a line."""

    def __init__(self, file: Path):
        self.file = file
        self.writes = True
        """False in all processes of a run but the first"""
        self.board: Board | None = None
        """gets every line too"""
        self.watcher: Watcher | None = None
        """gets every line in every process"""

    def __call__(self, kind: str, **values: Any) -> None:
        """Append a line."""
        if self.writes:
            self._append(kind, values)
        if self.watcher:
            self.watcher(kind, values)

    def _append(self, kind: str, values: dict[str, Any]) -> None:
        with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, **values}) + "\n")
        if self.board:
            try:
                self.board.write(kind, values)
            except OSError as error:  # it only shows what is in the file
                name, self.board = self.board.name, None
                self("note", step=values["step"], text=f"{name} ends here: {error.strerror or error}")

    def holds(self, kind: str, **values: Any) -> bool:
        """Whether the file has this line."""
        line = json.dumps({"kind": kind, **values})
        return self.file.exists() and line in self.file.read_text(encoding="utf-8", errors="replace").splitlines()

    def find(self, kind: str, step: int) -> dict[str, Any] | None:
        """The file's line of a kind at a step; None if it has none."""
        if not self.file.exists():
            return None
        lines = map(json.loads, _lines_until(self.file, step))
        return next((line for line in lines if line["step"] == step and line.get("kind") == kind), None)

    def forget_after(self, step: int) -> None:
        """Drop the lines that a resumed run will write again, and one that is cut short."""
        if self.file.exists():
            check_regular(self.file)
            with replacing(self.file) as stream:
                stream.writelines(_lines_until(self.file, step))


def _lines_until(file: Path, step: int) -> Iterator[bytes]:
    """The lines of a metrics file up to a step, without one that is cut short or is no event."""
    with file.open("rb") as stream:
        while line := stream.readline(LINE_LIMIT):
            try:
                values = json.loads(line)
                here = values["step"] if isinstance(values, dict) else None
            except (ValueError, KeyError, RecursionError):
                continue
            if type(here) is int and here <= step and line.endswith(b"\n"):
                yield line
