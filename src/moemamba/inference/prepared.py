"""A step on the CPU with all that stays the same looked up beforehand, and prompts that are read along with it.

A token of a small model takes a millisecond. To ask each module for each token whether it still is what it was built as
would take another.

What a step and a short part of a prompt cost is above all reading the weights of experts. So where both are due, layers
that look at each position by itself are given those of both at once; the others go on from each its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import LAYERS, Choice
from ..layers.layer import Layer, Prepared
from ..layers.norm import prepare_norm
from ..layers.plain import plain
from ..layers.residual import Residual
from ..model import MoEMamba
from ..state import State
from .prefill import Group, Read
from .slots import Slots

TOGETHER = 512  # positions of prompts in a step; of more the weights are the smaller part


class PreparedStep:
    """A token of the first rows through a model, up to what the head sees. It holds as long as modules, hooks, the
    places of weights and those of the buffers stay as they are; weights may be changed in place."""

    def __init__(self, model: MoEMamba, slots: Slots):
        weight, mixers = model.embedding.weight, iter(slots.mixers)
        self.embedding, self.moved = weight, slots.moved
        self.x, self.h, self.hidden = (weight.new_empty(slots.rows + TOGETHER, weight.shape[1]) for _ in range(3))
        self.layers: list[tuple[Callable[[int], None], list[_Branch]]] = []
        for layer in model.layers:
            assert isinstance(layer, Residual)
            kinds = [LAYERS[letter] for letter in layer.letters]
            own = [next(mixers) for kind in kinds if kind.state_type is not None]
            normalise, steps = layer.prepare(own, self.x, self.h, slots.rows)
            self.layers.append((normalise, list(map(_Branch, kinds, layer.branches, steps))))
        self.normalise = prepare_norm(model.norm, self.x, self.hidden)

    def __call__(self, tokens: Tensor, room: int, place: Tensor, groups: Sequence[Group] = ()) -> Tensor:
        """Tokens (b,) -> hidden (b, d), which the next step overwrites. See `Layer.prepare` for `room` and `place`.

        Of the groups it reads those for which there are rows.
        """
        live = end = len(tokens)
        torch.index_select(self.embedding, 0, tokens, out=self.x[:live])
        beside: list[_Beside] = []
        for group in groups:
            if end + group.count <= len(self.x):
                beside.append(_Beside(group, end))
                end += group.count
                torch.index_select(self.embedding, 0, beside[-1].tokens, out=self.x[beside[-1].rows])
        for normalise, branches in self.layers:
            normalise(end)
            for branch in branches:
                if beside and branch.positionwise:
                    self._through(branch, end, beside)
                    continue
                branch.step(live, room, place)
                for each in beside:
                    each.read(branch, self.h, self.x)
        self.normalise(end)
        for each in beside:
            each.group.found = Read(each.laid(self.hidden), State(tuple(each.mixers)), tuple(each.load))
        return self.hidden[:live]

    def _through(self, branch: "_Branch", end: int, beside: list["_Beside"]) -> None:
        """The first `end` rows, as one sequence."""
        record: list[Choice] = []
        y, _, stats = branch.kind.call(branch.layer, self.h[None, :end], record=record)
        self.x[:end] += y[0]
        for choice, own in zip(record, stats, strict=True):
            for each in beside:
                each.note(choice, len(own.load))


class _Branch:
    """A layer, or what has been put in its place, and its step."""

    def __init__(self, kind: type[Layer], layer: nn.Module, step: Prepared):
        self.kind, self.layer, self.step = kind, layer, step
        self.positionwise = isinstance(layer, kind) and layer.positionwise()


class _Beside:
    """A group of prompts behind the rows that decode, its positions one after the other without padding.

    Attributes:
        rows: theirs.
        mixers, load: see `Read`, of the layers so far.
    """

    def __init__(self, group: Group, first: int):
        self.group, self.rows = group, slice(first, first + group.count)
        self._real = None if group.seq_idx is None else group.seq_idx >= 0
        self.mixers: list[Any] = []
        self.load: list[Tensor] = []

    @property
    def tokens(self) -> Tensor:
        """(n,) of these rows."""
        return self._flat(self.group.tokens)

    def laid(self, flat: Tensor) -> Tensor:
        """A copy of these rows of (n, ...), as (b, l, ...) with zeros at padding."""
        own = flat[self.rows]
        if self._real is None:
            return own.clone().unflatten(0, self.group.tokens.shape)
        padded = own.new_zeros(*self._real.shape, *own.shape[1:])
        padded[self._real] = own
        return padded

    def read(self, branch: _Branch, h: Tensor, x: Tensor) -> None:
        """Add to these rows of x (n, d) what a layer makes of those of h, as sequences."""
        group, remembers = self.group, branch.kind.state_type is not None
        before = None if group.state is None or not remembers else group.state.mixers[len(self.mixers)]
        y, after, stats = branch.kind.call(branch.layer, self.laid(h), before, group.seq_idx, group.record)
        x[self.rows] += self._flat(y)
        self.mixers += [after] if remembers else []
        self.load += [own.load for own in stats]

    def note(self, choice: Choice, n_experts: int) -> None:
        """What a router chose for all rows, (1, n, k)."""
        own = choice.indices[0, self.rows].flatten()
        self.load.append(torch.bincount(own, minlength=n_experts).to(choice.gates.dtype))
        if self.group.record is not None:
            self.group.record.append(Choice(*(self.laid(part[0]) for part in choice)))

    def _flat(self, laid: Tensor) -> Tensor:
        """(b, l, ...) -> (n, ...) without padding."""
        return laid.flatten(0, 1) if self._real is None else laid[self._real]


def prepared(model: MoEMamba, slots: Slots) -> PreparedStep | None:
    """None where it would not be what calls do: on a GPU, under autocast, in another dtype, with another backend."""
    weight = model.embedding.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.float32 and ops.choose("mamba_step", weight) == "cpu"
    if not here or torch.is_autocast_enabled("cpu") or not slots.mixers or not plain(model.embedding, nn.Embedding):
        return None
    if not all(isinstance(layer, Residual) and plain(layer, Residual) for layer in model.layers):
        return None
    return PreparedStep(model, slots)
