"""The states of the rows that are being decoded, in buffers that stay where they are."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.layer import Layer
from ..state import State

ROOM = 256  # what grows with a sequence is kept in buffers of a multiple of this


class Slots:
    """State buffers for a number of rows, of which rows 0 .. live - 1 are in use.

    What is in use is a slice of each buffer, so that a step gathers nothing: who leaves is overwritten by the last.

    Args:
        kinds: the layers whose states these are, bottom to top.
        rows: how many there are at most.

    Attributes:
        mixers: of each of these layers its buffers for all rows; none before the first row is put.
        tokens: (rows,) int64, what each row reads next.
        places: (rows,) int64, tokens of each row so far, padding included.
        moved: how often buffers have been put elsewhere.
    """

    def __init__(self, kinds: Sequence[type[Layer]], rows: int, device: torch.device | str):
        self.kinds, self.rows, self.live, self.room, self.moved = kinds, rows, 0, 0, 0
        self.mixers: list[Any] = []
        self.tokens, self.places = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self._lengths = [0] * rows  # entries of what grows, where the host can read them

    @property
    def longest(self) -> int:
        """Entries of what grows with a sequence, of the live row that has most."""
        return max(self._lengths[: self.live], default=0)

    def put(self, state: State, tokens: Tensor) -> None:
        """Take in the rows of a state, copying them, as the last live ones; they read tokens (b,) next."""
        count = len(tokens)  # a state without mixers does not say how many rows it is of
        rows = slice(self.live, self.live + count)
        lengths = [kind.length(mixer) for kind, mixer in zip(self.kinds, state.mixers, strict=True)]
        length = max(lengths, default=0)
        self.reserve(length)
        if not self.mixers:
            room = max(self.room, ROOM)
            pairs = zip(self.kinds, state.mixers, strict=True)
            self.mixers = [kind.allocate(self.rows, room, mixer) for kind, mixer in pairs]
            self.room, self._grow = room, [length > 0 for length in lengths]
        for kind, buffers, mixer in zip(self.kinds, self.mixers, state.mixers, strict=True):
            kind.put(buffers, rows, mixer)
        self.tokens[rows], self.places[rows] = tokens, length
        self._lengths[rows] = [length] * count
        self.live = rows.stop

    def take(self, row: int) -> State:
        """A copy of the state of a live row."""
        own, length = slice(row, row + 1), self._lengths[row]
        return State(tuple(k.take(buffers, own, length) for k, buffers in zip(self.kinds, self.mixers, strict=True)))

    def drop(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Let rows go; the last live rows move into their places.

        Returns:
            (to, from) of each row that has moved.
        """
        gone = set(rows)
        left = self.live - len(gone)
        to = sorted(row for row in gone if row < left)
        source = [row for row in range(left, self.live) if row not in gone]
        self.live = left
        if to:
            new, old = (torch.tensor(each, device=self.places.device) for each in (to, source))
            for tensor in (self.tokens, self.places):
                tensor[new] = tensor[old]
            for kind, buffers in zip(self.kinds, self.mixers, strict=True):
                kind.move(buffers, old, new)
            for target, row in zip(to, source, strict=True):
                self._lengths[target] = self._lengths[row]
        return list(zip(to, source, strict=True))

    def reserve(self, length: int) -> None:
        """Make room for `length` entries of what grows."""
        if length <= self.room:
            return
        before, self.room = self.room, -(-length // ROOM) * ROOM
        for index, (kind, buffers) in enumerate(zip(self.kinds, self.mixers, strict=False)):
            if self._grow[index]:
                self.mixers[index] = kind.allocate(self.rows, self.room, buffers)
                kind.put(self.mixers[index], slice(0, self.live), kind.take(buffers, slice(0, self.live), before))
                self.moved += 1

    def seen(self, length: int) -> list[Any]:
        """Views of the buffers, with room for `length` entries of what grows."""
        return [kind.within(buffers, length) for kind, buffers in zip(self.kinds, self.mixers, strict=True)]

    def advance(self) -> None:
        """Each live row has read a token, which `places` knows already."""
        if self.longest:
            for row in range(self.live):
                self._lengths[row] += 1
