"""Which requests a step of the engine works on. No torch and no clock here: what is planned depends on calls alone."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """Positions first .. last - 1 of a request's prompt."""

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


class Scheduler:
    """Continuous batching: a step holds all live rows, and at most a chunk of prompt positions.

    Requests get their slots in the order in which they came, and keep them until they finish: none is put off again.
    Prompts that are being read take turns and share the chunk equally, so that a long one does not hold up a short one.

    Args:
        slots: requests that are read or decoded at once.
        chunk: prompt positions in a step, which bounds the time between two tokens of the others.
        piece: positions of one prompt in a step, which bounds the memory of a long one.
    """

    def __init__(self, slots: int, chunk: int, piece: int):
        for name, value in (("slots", slots), ("chunk", chunk), ("piece", piece)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.slots, self.chunk, self.piece = slots, chunk, piece
        self._waiting: deque[_Reading] = deque()
        self._reading: deque[_Reading] = deque()
        self._live: dict[int, None] = {}  # in the order in which they began to decode

    @property
    def busy(self) -> bool:
        """Whether a request has not finished."""
        return bool(self._waiting or self._reading or self._live)

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return self.slots - len(self._reading) - len(self._live)

    @property
    def live(self) -> tuple[int, ...]:
        """Requests that decode, a token in each step."""
        return tuple(self._live)

    def add(self, request: int, length: int) -> None:
        """Queue a request by its number, which no other has, with a prompt of `length` tokens."""
        if length < 1:
            raise ValueError(f"request {request} has a prompt of {length} tokens; it needs one at least")
        self._waiting.append(_Reading(request, length))

    def finish(self, request: int) -> None:
        """A request has ended or is given up, at whatever stage: its slot is free from the next step on."""
        if request in self._live:
            del self._live[request]
            return
        for queue in (self._reading, self._waiting):
            for one in queue:
                if one.request == request:
                    queue.remove(one)
                    return
        raise ValueError(f"request {request} is not known, or has finished")

    def plan(self) -> list[Part]:
        """What is read of which prompts in the step that comes; the step decodes what is live before this call."""
        while self._waiting and self.free:
            self._reading.append(self._waiting.popleft())
        shares = self._shares()
        parts = []
        for one, share in zip(list(self._reading), shares, strict=False):
            first, one.done = one.done, one.done + share
            parts.append(Part(one.request, first, one.done, one.done == one.length))
            self._reading.popleft()
            if one.done == one.length:
                self._live[one.request] = None
            else:
                self._reading.append(one)  # others' turn first
        return parts

    def _shares(self) -> list[int]:
        """Positions for each of the first prompts of the queue, as equal as their ends allow."""
        wanted = [min(one.length - one.done, self.piece) for one in self._reading][: self.chunk]
        shares, left = [0] * len(wanted), self.chunk
        order = sorted(range(len(wanted)), key=wanted.__getitem__)  # who needs less leaves more to the others
        for place, index in enumerate(order):
            shares[index] = min(wanted[index], left // (len(order) - place))
            left -= shares[index]
        return shares
