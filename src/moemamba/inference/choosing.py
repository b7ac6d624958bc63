"""The next token of each of several rows, each with its own way to choose and its own randomness."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import Sampling
from .draws import Draws
from .request import Constraint

TINY = torch.finfo(torch.float32).tiny
AHEAD = 32  # positions whose draws are made at once, at most


def sample(logits: Tensor, sampling: Sampling, draws: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    Args:
        logits: (b, v).
        draws: (b, v) float32, exponential variables of `Draws`; from torch's own generator if None.
    Returns:
        (b,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Relative to the largest, and at a temperature that float32 holds, nothing becomes infinite that was not.
    temperature = min(max(sampling.temperature, TINY), 1 / TINY)
    scaled = logits.float()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        most, places = scaled.topk(sampling.top_k, dim=-1)  # k of them, of equals too
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, places, most)
    if sampling.top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # probability of all that is more likely
        scaled = scaled.masked_fill((before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf)
    if sampling.min_p is not None:
        probabilities = scaled.softmax(dim=-1)
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(probabilities < floor, -torch.inf)
    # Of exponential variables with these rates the first to come: as torch.multinomial, which also asks whether all is
    # well, and whose randomness is that of the whole batch.
    times = torch.empty_like(scaled).exponential_() if draws is None else draws
    return scaled.softmax(dim=-1).div_(times).argmax(dim=-1)


class Tilt:
    """What is added to the logits of one row: a bias, and penalties for what it has written.

    Args:
        bias: by token.
    """

    def __init__(self, sampling: Sampling, bias: Mapping[int, float], vocabulary: int, device: torch.device):
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self.added = torch.zeros(vocabulary, device=device)
        for token, value in bias.items():
            self.added[token] = value
        self._written = torch.zeros(vocabulary, device=device) if self._presence or self._frequency else None

    @classmethod
    def of(cls, sampling: Sampling, bias: Mapping[int, float], vocabulary: int, device: torch.device) -> "Tilt | None":
        """None where nothing is added."""
        if not (sampling.presence_penalty or sampling.frequency_penalty or bias):
            return None
        return cls(sampling, bias, vocabulary, device)

    def write(self, token: Tensor) -> None:
        """The row goes on with a token (1,), which may still be on its way."""
        if self._written is not None:
            first = self._written[token] == 0
            self.added.index_add_(0, token, -self._frequency - self._presence * first.float())
            self._written[token] = 1


class Row(Protocol):
    """A sequence that goes on."""

    sampling: Sampling
    seed: tuple[int, int] | None
    """seed and sample; None takes randomness from torch's generator"""
    tilt: Tilt | None

    @property
    def position(self) -> int:
        """in the sequence, of the token to choose"""

    @property
    def constraint(self) -> Constraint | None:
        """what the sequence has to keep to"""


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
        self._tilts = [(place, row.tilt) for place, row in enumerate(rows) if row.tilt is not None]
        constraints = [(place, row.constraint) for place, row in enumerate(rows)]
        self._constraints = [(place, each) for place, each in constraints if each is not None]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (b, v) -> (b,) int64 of the next position of each row."""
        if self._step % AHEAD == 0:
            self._groups = self._grouped(min(AHEAD, self._left))
        if self._tilts or self._constraints:
            logits = self._changed(logits)
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
        for place, tilt in self._tilts:
            tilt.write(chosen[place : place + 1])
        self._step, self._left = self._step + 1, self._left - 1
        return chosen

    def _changed(self, logits: Tensor) -> Tensor:
        """A copy of the logits with what is added to some rows, and without what is not allowed in some."""
        logits = logits.float().clone()
        for place, tilt in self._tilts:
            logits[place] += tilt.added
        for place, constraint in self._constraints:
            allowed = torch.from_numpy(np.asarray(constraint.allowed())).to(self._device)
            logits[place].masked_fill_(~allowed, -torch.inf)
        return logits

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
