"""A step on the CPU with all that stays the same looked up beforehand.

A token of a small model takes a millisecond. To ask each module for each token whether it still is what it was built as
would take another.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import LAYERS
from ..layers.norm import prepare_norm
from ..layers.plain import plain
from ..layers.residual import Residual
from ..model import MoEMamba
from .slots import Slots


class PreparedStep:
    """A token of the first rows through a model, up to what the head sees. It holds as long as modules, hooks, the
    places of weights and those of the buffers stay as they are; weights may be changed in place."""

    def __init__(self, model: MoEMamba, slots: Slots):
        weight, mixers = model.embedding.weight, iter(slots.mixers)
        self.embedding, self.moved = weight, slots.moved
        self.x, h, self.hidden = (weight.new_empty(slots.rows, weight.shape[1]) for _ in range(3))
        self.steps: list[Any] = []
        for layer in model.layers:
            own = [next(mixers) for letter in layer.letters if LAYERS[letter].state_type is not None]  # type: ignore[union-attr]
            self.steps += layer.prepare(own, self.x, h)  # type: ignore[operator]
        self.normalise = prepare_norm(model.norm, self.x, self.hidden)

    def __call__(self, tokens: Tensor, room: int, place: Tensor) -> Tensor:
        """Tokens (b,) -> hidden (b, d), which the next step overwrites. See `Layer.prepare` for the others."""
        live = len(tokens)
        torch.index_select(self.embedding, 0, tokens, out=self.x[:live])
        for step in self.steps:
            step(live, room, place)
        self.normalise(live)
        return self.hidden[:live]


def prepared(model: MoEMamba, slots: Slots) -> PreparedStep | None:
    """None where it would not be what calls do: on a GPU, under autocast, in another dtype, with another backend."""
    weight = model.embedding.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.float32 and ops.choose("mamba_step", weight) == "cpu"
    if not here or torch.is_autocast_enabled("cpu") or not slots.mixers or not plain(model.embedding, nn.Embedding):
        return None
    if not all(isinstance(layer, Residual) and plain(layer, Residual) for layer in model.layers):
        return None
    return PreparedStep(model, slots)
