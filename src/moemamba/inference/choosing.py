"""The next token of each of several rows, each with its own way to choose and its own randomness."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .config import Sampling
from .draws import Draws
from .sampling import sample

AHEAD = 32  # positions whose draws are made at once, at most


class Row(Protocol):
    """A sequence that goes on."""

    sampling: Sampling
    seed: tuple[int, int] | None
    """seed and sample; None takes randomness from torch's generator"""

    @property
    def position(self) -> int:
        """in the sequence, of the token to choose"""


class _Group(NamedTuple):
    """Rows that choose in the same way."""

    sampling: Sampling
    rows: Tensor | None
    """their numbers; None if they are all"""
    draws: Draws | None


class Chooser:
    """Chooses tokens for the same rows again and again, as long as none leaves and none comes."""

    def __init__(self, rows: Sequence[Row], count: int, vocabulary: int, device: torch.device):
        """`count`: most tokens that will be chosen for a row."""
        self._rows, self._left, self._vocabulary, self._device = rows, count, vocabulary, device
        self._step = 0
        self._groups: list[_Group] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (b, v) -> (b,) int64 of the next position of each row."""
        if self._step % AHEAD == 0:
            self._groups = self._grouped(min(AHEAD, self._left))
        chosen: Tensor | None = None
        for sampling, rows, draws in self._groups:
            drawn = None if draws is None else draws.at(self._step % AHEAD)
            if rows is None:
                chosen = sample(logits, sampling, drawn)
                break
            if chosen is None:
                chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            chosen[rows] = sample(logits[rows], sampling, drawn)
        assert chosen is not None
        self._step, self._left = self._step + 1, self._left - 1
        return chosen

    def _grouped(self, count: int) -> list[_Group]:
        kinds: dict[tuple[Sampling, bool], list[int]] = {}
        for place, row in enumerate(self._rows):
            kinds.setdefault((row.sampling, row.seed is not None and row.sampling.temperature > 0), []).append(place)
        groups = []
        for (sampling, seeded), places in kinds.items():
            numbers = None if len(kinds) == 1 else torch.tensor(places, device=self._device)
            groups.append(_Group(sampling, numbers, self._draws(places, count) if seeded else None))
        return groups

    def _draws(self, places: list[int], count: int) -> Draws:
        own = [self._rows[place] for place in places]
        seeds = [row.seed for row in own if row.seed is not None]
        return Draws(seeds, [row.position for row in own], count, self._vocabulary, self._device)
