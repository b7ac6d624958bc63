"""One table of names a format: which of their tensors make up one of ours, read in both directions."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Join = Callable[[Sequence[Tensor]], Tensor]
Split = Callable[[Tensor], Sequence[Tensor]]


class Entry(NamedTuple):
    """A tensor of ours and those of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    join: Join = lambda tensors: tensors[0]
    """theirs, in order -> ours"""
    split: Split = lambda tensor: [tensor]
    """the other way"""


def renamed(ours: str, theirs: str, names: Iterable[str]) -> list[Entry]:
    """Tensors that have the same name below another place."""
    return [Entry(f"{ours}{name}", (f"{theirs}{name}",)) for name in names]


def rows(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Entry:
    """Theirs below each other are ours; `sizes` are the rows of each."""
    return Entry(
        ours, tuple(theirs), lambda tensors: torch.cat(list(tensors)), lambda tensor: tensor.split(list(sizes))
    )


def stacked(ours: str, theirs: Sequence[str]) -> Entry:
    """Ours (e, ...) has theirs, one an expert."""
    return Entry(ours, tuple(theirs), lambda tensors: torch.stack(list(tensors)), lambda tensor: tensor.unbind())


def stacked_halves(ours: str, first: Sequence[str], second: Sequence[str]) -> Entry:
    """Ours (e, 2f, d) has for each expert the rows of `first`, then those of `second`."""
    n = len(first)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.stack(list(tensors[:n])), torch.stack(list(tensors[n:]))], dim=1)

    def split(tensor: Tensor) -> Sequence[Tensor]:
        above, below = tensor.chunk(2, dim=1)
        return [*above.unbind(), *below.unbind()]

    return Entry(ours, (*first, *second), join, split)
