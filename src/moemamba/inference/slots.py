"""The states of the rows that are being decoded, in buffers that stay where they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..layers import AttentionState
from ..state import MixerState, State

ROOM = 256  # keys and values are kept in buffers of a multiple of this


class Slots:
    """State buffers for a number of rows, of which rows 0 .. live - 1 are in use.

    What is in use is a slice of each buffer, so that a step gathers nothing: who leaves is overwritten by the last.
    The keys and values of attention lie in buffers with room to spare, whose entries yet to come count as not of the
    sequence.

    Attributes:
        mixers: of each sequence mixer, bottom to top, its buffers for all rows; none before the first row is put.
        tokens: (rows,) int64, what each row reads next.
        lengths: (rows,) int64, entries of keys and values of each row.
        moved: how often buffers have been put elsewhere.
    """

    def __init__(self, rows: int, device: torch.device | str):
        self.rows, self.live, self.room, self.moved = rows, 0, 0, 0
        self.mixers: list[MixerState] = []
        self.tokens, self.lengths = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self._lengths = [0] * rows  # the same, where the host can read them

    @property
    def longest(self) -> int:
        """Entries of keys and values of the live row that has most."""
        return max(self._lengths[: self.live], default=0)

    def put(self, state: State, tokens: Tensor) -> None:
        """Take in the rows of a state, copying them, as the last live ones; they read tokens (b,) next."""
        first, last = self.live, self.live + state.batch_size
        if not self.mixers:
            self.mixers = [_buffers(mixer, self.rows, self.room) for mixer in state.mixers]
        length = max((mixer.keys.shape[2] for mixer in state.mixers if isinstance(mixer, AttentionState)), default=0)
        self.reserve(length)
        for buffers, mixer in zip(self.mixers, state.mixers, strict=True):
            if isinstance(mixer, AttentionState) and isinstance(buffers, AttentionState):
                buffers.positions[first:last] = -1
                buffers.positions[first:last, :length] = mixer.positions
                buffers.keys[first:last].zero_()
                buffers.values[first:last].zero_()
                buffers.keys[first:last, :, :length] = mixer.keys
                buffers.values[first:last, :, :length] = mixer.values
            else:
                for buffer, tensor in zip(buffers, mixer, strict=True):
                    buffer[first:last] = tensor
        self.tokens[first:last], self.lengths[first:last] = tokens, length
        self._lengths[first:last] = [length] * state.batch_size
        self.live = last

    def take(self, row: int) -> State:
        """A copy of the state of a live row."""
        return State(tuple(_taken(mixer, slice(row, row + 1), self._lengths[row]) for mixer in self.mixers))

    def drop(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Let rows go; the last live rows move into their places.

        Returns:
            (to, from) of each row that has moved.
        """
        gone = set(rows)
        left = self.live - len(gone)
        moves = list(
            zip(
                sorted(row for row in gone if row < left),
                (row for row in range(left, self.live) if row not in gone),
                strict=True,
            )
        )
        self.live = left
        if moves:
            to, source = (torch.tensor(each, device=self.lengths.device) for each in zip(*moves, strict=True))
            for tensor in (self.tokens, self.lengths, *(tensor for mixer in self.mixers for tensor in mixer)):
                tensor.index_copy_(0, to, tensor[source])
            for new, old in moves:
                self._lengths[new] = self._lengths[old]
        return moves

    def reserve(self, length: int) -> None:
        """Make room for `length` keys and values a row."""
        if length <= self.room:
            return
        self.room = -(-length // ROOM) * ROOM
        for index, mixer in enumerate(self.mixers):
            if isinstance(mixer, AttentionState):
                self.mixers[index] = larger = _buffers(mixer, self.rows, self.room)
                for new, old in zip(larger, mixer, strict=True):
                    (new[:, : old.shape[1]] if old.ndim == 2 else new[:, :, : old.shape[2]]).copy_(old)
                self.moved += 1

    def part(self, rows: int) -> list[MixerState]:
        """Views of the first rows of all buffers."""
        return [type(mixer)(*(tensor[:rows] for tensor in mixer)) for mixer in self.mixers]

    def advance(self) -> None:
        """Each live row has got one more entry of keys and values, which `lengths` knows already."""
        for row in range(self.live):
            self._lengths[row] += 1


def _buffers(mixer: MixerState, rows: int, room: int) -> MixerState:
    """Of the dtypes and shapes of a state, but for the number of rows and of keys and values."""
    if isinstance(mixer, AttentionState):
        heads, width = mixer.keys.shape[1], mixer.keys.shape[3]
        keys, values = (tensor.new_zeros(rows, heads, room, width) for tensor in mixer[:2])
        return AttentionState(keys, values, mixer.positions.new_full((rows, room), -1))
    return type(mixer)(*(tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in mixer))


def _taken(mixer: MixerState, rows: slice, length: int) -> MixerState:
    if isinstance(mixer, AttentionState):
        keys, values, positions = (tensor[rows] for tensor in mixer)
        return AttentionState(keys[:, :, :length].clone(), values[:, :, :length].clone(), positions[:, :length].clone())
    return type(mixer)(*(tensor[rows].clone() for tensor in mixer))
