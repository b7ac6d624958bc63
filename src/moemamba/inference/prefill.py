"""Reading prompts: parts of several at once, padded on the left."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.layer import Layer
from ..model import MoEMamba
from ..state import State
from .scheduler import Part

LITTLE = 512  # positions of padding that cost less than another call


def alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that are read together: all begin their prompts or none does, and little or less than half is padding."""
    groups: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (part.first > 0, part.first - part.last)):
        length = part.last - part.first
        if groups:
            longest = groups[-1][0]
            padding = longest.last - longest.first - length
            same = (longest.first > 0) == (part.first > 0)
            if same and (padding <= length or padding * (len(groups[-1]) + 1) <= LITTLE):
                groups[-1].append(part)
                continue
        groups.append([part])
    return groups


def read(model: MoEMamba, rows: Sequence[Sequence[int]], state: State | None) -> tuple[Tensor, State]:
    """Read tokens of several prompts after a state of as many rows.

    Returns:
        (b, d) what the head sees at each row's last token, and the state.
    """
    device, longest = model.embedding.weight.device, max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    seq_idx = None
    if any(len(row) < longest for row in rows):
        marks = [[-1] * (longest - len(row)) + [0] * len(row) for row in rows]
        seq_idx = torch.tensor(marks, device=device)
    hidden, state, _ = model.backbone(tokens, state, seq_idx)
    return hidden[:, -1], state


def joined(kinds: Sequence[type[Layer]], states: Sequence[State]) -> State:
    """The rows of several states of layers of these kinds, one after the other."""
    mixers = zip(*(state.mixers for state in states), strict=True)
    return State(tuple(kind.join(each) for kind, each in zip(kinds, mixers, strict=True)))
