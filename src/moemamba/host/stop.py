"""Signals that end a run in good order: the step is finished, saved, and said how to go on from."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# A person's Ctrl-C; a scheduler's or container's end; what SLURM sends before it if asked to (--signal=USR1@120); a
# terminal that was closed.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

HANGUP = getattr(signal, "SIGHUP", None)
SAME = 10.0
AWAKE = 0.2  # seconds after which a wait looks for signals, where the system does not wake it


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, which is saved; str() says how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message, number)
        self.message, self.number = message, number

    def __str__(self) -> str:
        return self.message


def interruptible(work: Callable[[Iterable[Item]], Result], items: Iterable[Item]) -> Result:
    """`work(items)` in a thread of its own, so that Ctrl-C ends the wait for it at once.

    Python hears signals between its own instructions, and a library may be minutes without one. A thread that nobody
    waits for gets no more items, and ends with the process at the latest.
    """
    left = threading.Event()

    def handed() -> Iterator[Item]:
        for item in items:
            if left.is_set():
                raise RuntimeError("nobody waits for this any more")
            yield item

    def run() -> None:
        try:
            found.set_result(work(handed()))
        except BaseException as error:
            found.set_exception(error)

    found: Future[Result] = Future()
    try:
        threading.Thread(target=run, daemon=True, name="work").start()
        while True:
            with suppress(TimeoutError):
                return found.result(AWAKE)
            if found.done():  # the error is the work's own
                return found.result()
    except BaseException:
        left.set()
        raise


def _tell(text: str) -> None:
    """To the person at the terminal, by the one process of theirs that answers it: a step may be long."""
    if not hasattr(os, "tcgetpgrp") or os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError):  # there is no terminal
        if os.tcgetpgrp(2) == os.getpgrp():
            os.write(2, text.encode())  # not by `print`, amidst which the signal may have come


class Stop:
    """While entered, the first signal is remembered in `number`, and a second one does what it would have done.

    A scheduler may tell a process and its launcher, which tells the process again: signals but SIGINT that come within
    `SAME` seconds of the first signal are the first.

    Outside the main thread Python cannot handle signals: there nothing changes.
    """

    def __init__(self) -> None:
        self.number = 0
        """of the signal; 0 if there was none. Several processes agree by its maximum over them."""
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it is to go on
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._first = number, time.monotonic()
            if number == signal.SIGINT:
                _tell("\nstopping after this step; Ctrl-C again stops at once, without saving\n")
        elif number == signal.SIGINT or time.monotonic() - self._first > SAME:
            self.__exit__()
            signal.raise_signal(number)

    @property
    def name(self) -> str:
        """Of the signal: "SIGTERM"."""
        return signal.Signals(self.number).name
