"""Which requests a step of the engine works on. No torch and no clock here: what is planned depends on calls alone."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

TURN = 4  # steps of which one belongs to the prompt that came first
MOST = 2048  # positions in a step that has time for them
AIM = 0.85  # of the time that a step may take, since they vary


class Part(NamedTuple):
    """Positions first .. last - 1 of a request's prompt; none of one that is known to its end."""

    request: int
    first: int
    last: int
    ends: bool
    """whether the prompt ends here, so that the request decodes from the next step on"""


@dataclass
class _Reading:
    """A prompt of which positions are left to read."""

    request: int
    length: int
    done: int = 0
    cuts: Sequence[int] = ()
    """positions, in order, that a part must not cross"""

    def left(self, most: int) -> int:
        """Positions that a part may have: up to `most`, the next cut, or the end."""
        following = next((cut for cut in self.cuts if cut > self.done), self.length)
        return min(most, following - self.done, self.length - self.done)


class Scheduler:
    """Continuous batching: a step holds all live rows, and at most a chunk of prompt positions.

    Requests get their slots in the order in which they came, and keep them until they finish: none is put off again.
    Of the prompts that are being read the one with least left comes first, so that a long one does not hold up a short
    one and first tokens come early on average; in every fourth step it is the one that came first, lest it starve.

    Args:
        slots: requests that are read or decoded at once.
        chunk: prompt positions in a step, which bounds the time between two tokens of the others.
        piece: positions of one prompt in a step, which bounds the memory of a long one.
        alone: the chunk while nothing decodes; as `chunk` if None.
        gap: seconds below which a step may have more positions than `chunk`, as many as it turns out to have time for.
            It never has fewer: small ones cost more in all, since most of their time goes into reading the weights.
    """

    def __init__(self, slots: int, chunk: int, piece: int, alone: int | None = None, gap: float | None = None):
        alone = chunk if alone is None else alone
        for name, value in (("slots", slots), ("chunk", chunk), ("piece", piece), ("alone", alone)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.slots, self.chunk, self.piece, self.alone, self.gap = slots, chunk, piece, alone, gap
        self._fitting, self._paced = chunk, 0  # positions that fit into the gap; those of the last step, if it counts
        self._waiting: deque[_Reading] = deque()
        self._reading: deque[_Reading] = deque()
        self._held: dict[int, _Reading] = {}  # with a slot, until somebody else has read the same prompt
        self._live: dict[int, None] = {}  # in the order in which they began to decode
        self._plans = 0

    @property
    def busy(self) -> bool:
        """Whether a request has not finished."""
        return bool(self._waiting or self._reading or self._held or self._live)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return self.slots - len(self._reading) - len(self._held) - len(self._live)

    @property
    def live(self) -> tuple[int, ...]:
        """Requests that decode, a token in each step."""
        return tuple(self._live)

    def add(self, request: int, length: int) -> None:
        """Queue a request by its number, which no other has, with a prompt of `length` tokens."""
        self._waiting.append(_Reading(request, length))

    def admit(self) -> list[int]:
        """Give free slots to who has waited longest. Each may then `begin` where it likes, or be put on `hold`."""
        admitted = []
        while self._waiting and self.free:
            one = self._waiting.popleft()
            self._reading.append(one)
            admitted.append(one.request)
        return admitted

    def begin(self, request: int, done: int, cuts: Sequence[int] = ()) -> None:
        """Of an admitted prompt so many positions are known; parts of it end at the cuts. One on hold goes on."""
        one = self._held.pop(request, None)
        if one is None:
            one = next(one for one in self._reading if one.request == request)
        else:
            self._reading.append(one)
        one.done, one.cuts = done, cuts

    def hold(self, request: int) -> None:
        """An admitted request keeps its slot and reads nothing, until it `begin`s or is `ready`."""
        one = next(one for one in self._reading if one.request == request)
        self._reading.remove(one)
        self._held[request] = one

    def ready(self, request: int) -> None:
        """A request on hold decodes from the next step on: its prompt has been read."""
        del self._held[request]
        self._live[request] = None

    def finish(self, request: int) -> None:
        """A request has ended or is given up, at whatever stage: its slot is free from the next step on."""
        if request in self._live:
            del self._live[request]
            return
        if self._held.pop(request, None) is not None:
            return
        for queue in (self._reading, self._waiting):
            for one in queue:
                if one.request == request:
                    queue.remove(one)
                    return
        raise ValueError(f"request {request} is not known, or has finished")

    def plan(self) -> list[Part]:
        """What is read of which prompts in the step that comes; the step decodes what is live before this call."""
        self.admit()
        self._plans += 1
        most = left = self._fitting if self._live else self.alone
        paced, parts = bool(self._live), []
        for one in self._ordered():
            share = min(one.left(self.piece), left)
            if not share and one.done < one.length:
                continue
            left -= share
            first, one.done = one.done, one.done + share
            parts.append(Part(one.request, first, one.done, one.done == one.length))
        for part in parts:
            if part.ends:
                self._live[part.request] = None
        self._reading = deque(one for one in self._reading if one.done < one.length)
        self._paced = most - left if paced else 0
        return parts

    def took(self, seconds: float) -> None:
        """The step that was planned last took so long, which says how much is read in the next ones."""
        if self.gap is None or not self._paced:
            return
        ratio = AIM * self.gap / max(seconds, 1e-9)
        if ratio < 1:
            self._fitting = max(self.chunk, int(min(self._fitting, self._paced) * max(ratio, 0.5)))
        elif self._paced >= self._fitting:
            self._fitting = max(self.chunk, min(MOST, int(self._fitting * min(ratio, 1.25)) + 1))

    def _ordered(self) -> list[_Reading]:
        """Who is read first."""
        if self._plans % TURN == 0:
            return list(self._reading)
        return sorted(self._reading, key=lambda one: one.length - one.done)
