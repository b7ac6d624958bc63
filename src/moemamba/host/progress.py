"""What a long run shows: a bar on a terminal, plain lines elsewhere. Where it cannot be shown the run goes on."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .terminal import display, visible

QUIET = 10.0  # seconds between plain lines


def notebook_line() -> Callable[[str], None] | None:
    """What shows a text in the place of the one that it showed before, in a notebook's output; None elsewhere."""
    python = sys.modules.get("IPython")  # a notebook has it already
    shell = python.get_ipython() if python is not None and hasattr(python, "get_ipython") else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display as show  # type: ignore[import-not-found,unused-ignore]

    shown: list[Any] = []

    def line(text: str) -> None:
        if shown:
            shown[0].update({"text/plain": text}, raw=True)
        else:
            shown.append(show({"text/plain": text}, raw=True, display_id=True))

    return line


class Report:
    """Progress of one run on standard output, or nothing at all.

    Args:
        label: begins every line, for several runs one after another.
        silent: show nothing.
        plain: show lines on a terminal too, where several runs share it.
        to: a logger that gets every line, in place of standard output.

    In a notebook, how far a task is stands in one line that changes.
    """

    def __init__(self, label: str = "", silent: bool = False, plain: bool = False, *, to: logging.Logger | None = None):
        self.label, self._plain, self._to = visible(label, line=True), plain, to
        self._line = None if silent or plain or to else notebook_line()
        self._output = display()
        self._console = Console(
            file=cast(TextIO, self._output),
            quiet=silent,
            highlight=False,
            soft_wrap=True,
            emoji=False,
            force_jupyter=False,  # where each line would be a display of its own
        )
        self._told = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first = self._total = 0
        self._last = 0.0
        self._since: tuple[int, float] | None = None
        """units done, and when, at the first sign of progress"""

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def warn(self, text: str) -> None:
        """A line that stays and is seen."""
        self._print(text, "bold yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        text = visible(text, line=True)
        text = f"{self.label}: {text}" if self.label else text
        if self._to is not None:
            if not self._console.quiet:
                self._to.log(logging.WARNING if style else logging.INFO, text)
            return
        self._console.print(text, markup=False, style=style)

    def lost(self) -> str | None:
        """Why nothing is shown any more, said once: standard output cannot be written. None if all is well."""
        why = None if self._console.quiet or self._to is not None else self._output.lost
        if why is None or self._told:
            return None
        self._told = True
        return why

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begin a task of `total` units; 0 if their number is not known."""
        self.end()
        self._first, self._total = done, total
        self._since = None
        self._last = time.monotonic()
        if self._console.is_terminal and not self._plain and self._to is None and self._line is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(
                f"{self.label} {what}".strip(), total=total or None, completed=done, text=""
            )

    def update(self, done: int, text: str) -> None:
        """So much of the task is done; `text` says how it goes."""
        now = time.monotonic()
        if self._since is None and done > self._first:
            self._since = done, now  # what came before was compiling too, of which nothing is left
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=visible(text, line=True))
        elif self._line is not None:
            share = f"{done / self._total:.0%}  " if self._total else ""
            self._line(f"{share}{visible(text, line=True)}{self._left(done, now)}")
        elif now - self._last >= QUIET and done > self._first:
            self._last = now
            self.note(f"{text}{self._left(done, now)}")

    def _left(self, done: int, now: float) -> str:
        """How long the rest takes, at the rate since the first units."""
        if not self._total or self._since is None or done <= self._since[0]:
            return ""
        first, since = self._since
        left = max(0, round((self._total - done) * (now - since) / (done - first)))
        return f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
