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
        plain: show lines on a terminal too, where several runs share it.
    """

    def __init__(self, label: str = "", silent: bool = False, plain: bool = False):
        self.label, self._plain = label, plain
        self._console = Console(file=sys.stdout, quiet=silent, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first = self._total = 0
        self._begun = self._last = 0.0

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"{self.label}: {text}" if self.label else text, markup=False)

    def warn(self, text: str) -> None:
        """A line that stays and is seen."""
        self._console.print(f"{self.label}: {text}" if self.label else text, markup=False, style="bold yellow")

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begin a task of `total` units; 0 if their number is not known."""
        self.end()
        self._first, self._total = done, total
        self._begun = self._last = time.monotonic()
        if self._console.is_terminal and not self._plain:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(
                f"{self.label} {what}".strip(), total=total or None, completed=done, text=""
            )

    def update(self, done: int, text: str) -> None:
        """So much of the task is done; `text` says how it goes."""
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif now - self._last >= QUIET and done > self._first:
            self._last = now
            left = max(0, round((self._total - done) * (now - self._begun) / (done - self._first)))
            when = f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left" if self._total else ""
            self.note(f"{text}{when}")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
