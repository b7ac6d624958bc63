"""State passing: what a row of a batch leaves behind is what the same row of the next one begins with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...state import State


class Carried:
    """The states of all rows between two batches, in tensors that stay where they are, as a captured step needs.

    They carry no gradient, and after a step that failed they are empty, since they may hold what is not finite.
    """

    def __init__(self) -> None:
        self._states: list[State] = []  # of each part of a batch; none before the first

    def before(self, part: int, goes_on: Tensor) -> State | None:
        """The state that a part of a batch begins with; of rows that do not go on (b,) an empty one."""
        if not self._states:
            return None
        return self._states[part].keep(goes_on)

    @torch.no_grad()
    def keep(self, states: Sequence[State], failed: Tensor) -> None:
        """Take over what the parts of a batch have left behind, unless the step has failed, () bool."""
        kept = [state.detach().keep(~failed) for state in states]
        if not self._states:
            self._states = kept
            return
        for place, state in zip(self._states, kept, strict=True):
            for mine, theirs in zip(place.mixers, state.mixers, strict=True):
                torch._foreach_copy_(list(mine), list(theirs))

    def state(self) -> State | None:
        """Of all rows, on the CPU, a copy to be saved; None before the first step."""
        return State(_joined([state.to("cpu") for state in self._states])) if self._states else None

    def go_on(self, state: State, parts: int, device: torch.device) -> None:
        """Begin with a state of all rows, which a checkpoint had."""
        rows = state.batch_size // parts
        cuts = [state.select(slice(part * rows, (part + 1) * rows)) for part in range(parts)]
        self._states = [State(_joined([cut])).to(device) for cut in cuts]


def _joined(states: Sequence[State]) -> tuple[object, ...]:
    """The mixers of several states, one below the other, as copies."""
    return tuple(
        type(each[0])(*(torch.cat(tensors) for tensors in zip(*each, strict=True)))
        for each in zip(*(state.mixers for state in states), strict=True)
    )
