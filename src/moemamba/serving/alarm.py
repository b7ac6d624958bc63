"""A time that is put off again and again, such as that at which a silent reader is given up."""

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """Calls a function once a time has come. To put it off costs nothing: the loop is asked when the old time comes.

    Times are those of the loop's clock, in seconds.
    """

    def __init__(self, call: Callable[[], object]):
        self._call, self._due = call, math.inf
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """So many seconds from now, whatever was said before; never if infinite."""
        self._due = self._loop.time() + seconds
        if self._handle is None or self._due < self._handle.when():
            self._ask()

    def stop(self) -> None:
        """Not any more."""
        self._due = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ask(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(self._due, self._look) if self._due < math.inf else None

    def _look(self) -> None:
        self._handle = None
        if self._loop.time() < self._due:
            self._ask()
        else:
            self._due = math.inf
            self._call()
