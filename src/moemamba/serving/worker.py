"""An engine with a thread of its own, which all requests of all clients share."""

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from ..inference import Engine, Event, Request

Batch = list[tuple["Ticket", int, Event]]
"""of one step: whose events, of which of its requests"""


class Full(RuntimeError):
    """As many requests wait as may."""


class Ticket:
    """Requests that came together. Events come to whoever the worker tells, with this object.

    Attributes:
        left: requests that have not ended.
    """

    def __init__(self, count: int):
        self.left = count
        self.numbers: list[int] = []  # in the engine; its thread's alone


class Worker:
    """Runs an engine in a thread until it is closed. Every method may be called from any thread.

    Args:
        deliver: called from the worker's thread with what each step made.
        most: requests that may be under way, those that wait included.
    """

    def __init__(self, engine: Engine, deliver: Callable[[Batch], None], most: int):
        self.engine, self.most = engine, most
        self._deliver = deliver
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._owners: dict[int, tuple[Ticket, int]] = {}
        self._lock = threading.Lock()
        self.pending = 0
        """requests that have not ended"""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], beyond: bool = False) -> Ticket:
        """Begin requests; `beyond` what may wait, for what goes on from a request that has just ended.

        Raises:
            Full: too many are under way.
        """
        with self._lock:
            if self.pending + len(requests) > self.most and not beyond:
                raise Full(f"{self.pending} requests are under way, and {self.most} are the most; try again later")
            self.pending += len(requests)
        ticket = Ticket(len(requests))
        self._commands.put(lambda: self._begin(ticket, requests))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Give requests up that have not ended; events may still be on their way."""
        self._commands.put(lambda: self._end(ticket))

    def close(self, timeout: float | None = None) -> None:
        """Stop the thread after the step that it is at; what is under way is given up."""
        self._commands.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        self.engine.bind()
        while self._obey():
            if not self.engine.busy:
                continue
            try:
                events = self.engine.step()
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                message = f"the engine could not go on with this request ({type(error).__name__}: {first})"
                events = [Event(number, None, 0, failure=message) for number in self._owners]
            self._tell(events)

    def _obey(self) -> bool:
        """Carry out what was asked for meanwhile, or wait for it if there is nothing else to do; False to stop."""
        try:
            command = self._commands.get(block=not self.engine.busy)
            while command is not None:
                command()
                command = self._commands.get(block=False)
        except Empty:
            return True
        return False

    def _begin(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        for place, request in enumerate(requests):
            try:
                number = self.engine.submit(request)
            except Exception as error:
                self._count(ticket, 1)
                self._deliver([(ticket, place, Event(-1, None, 0, failure=str(error)))])
                continue
            ticket.numbers.append(number)
            self._owners[number] = ticket, place

    def _end(self, ticket: Ticket) -> None:
        numbers = [number for number in ticket.numbers if self._owners.pop(number, None) is not None]
        self.engine.abort(*numbers)
        self._count(ticket, len(numbers))

    def _tell(self, events: Sequence[Event]) -> None:
        batch: Batch = []
        for event in events:
            owner = self._owners.get(event.request)
            if owner is None:
                continue
            batch.append((*owner, event))
            if event.kept is not None:
                del self._owners[event.request]
                self._count(owner[0], 1)
        if batch:
            self._deliver(batch)

    def _count(self, ticket: Ticket, ended: int) -> None:
        with self._lock:
            self.pending -= ended
            ticket.left -= ended
