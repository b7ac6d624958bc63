"""What a long run shows: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET = 10.0  # seconds between plain lines


class Report:
    """Progress of one run on standard output, or nothing at all.

    Args:
        label: begins every line, for several runs one after another.
        silent: show nothing.
    """

    def __init__(self, label: str = "", silent: bool = False):
        self.label = label
        self._console = Console(file=sys.stdout, quiet=silent, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"{self.label}: {text}" if self.label else text, markup=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begin a task of `total` units."""
        self.end()
        self._last = time.monotonic()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"{self.label} {what}".strip(), total=total, completed=done, text="")

    def update(self, done: int, text: str = "", total: int | None = None) -> None:
        """So much of the task is done; `text` says how it goes."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif text and time.monotonic() - self._last >= QUIET:
            self._last = time.monotonic()
            self.note(text)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
