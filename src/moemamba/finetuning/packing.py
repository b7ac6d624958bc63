"""Examples side by side in rows of one length, each of which begins from an empty state."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .examples import Example


class Rows(NamedTuple):
    """A batch, each (b, l)."""

    tokens: Tensor
    targets: Tensor
    """-100 where nothing is to be learnt"""
    seq_idx: Tensor
    """which example of the row; -1 behind the last"""


def pack(examples: Sequence[Example], order: Sequence[int], context: int, batch_size: int) -> Iterator[Rows]:
    """Batches of rows, filled in an order by the examples that follow each other; the last may have fewer rows."""
    rows: list[list[Example]] = [[]]
    room = context
    for number in order:
        need = len(examples[number].tokens) - 1
        if need > room:
            if len(rows) == batch_size:
                yield _rows(rows, context)
                rows.clear()
            rows.append([])
            room = context
        rows[-1].append(examples[number])
        room -= need
    if rows[-1]:
        yield _rows(rows, context)


def _rows(rows: Sequence[Sequence[Example]], context: int) -> Rows:
    longest = max(sum(len(example.tokens) - 1 for example in row) for row in rows)
    shape = (len(rows), min(context, longest))
    tokens, targets, marks = np.zeros(shape, np.int64), np.full(shape, -100, np.int64), np.full(shape, -1, np.int64)
    for number, row in enumerate(rows):
        place = 0
        for index, example in enumerate(row):
            end = place + len(example.tokens) - 1
            tokens[number, place:end] = example.tokens[:-1]
            targets[number, place:end] = np.where(example.learnt[1:], example.tokens[1:], -100)
            marks[number, place:end] = index
            place = end
    return Rows(*map(torch.from_numpy, (tokens, targets, marks)))
