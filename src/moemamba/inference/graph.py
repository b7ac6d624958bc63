"""A step of the live rows; on a GPU as CUDA graphs over the slots, one for each of a few numbers of rows.

A step of eager calls is bound by the host, which launches hundreds of small kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layers import LAYERS
from ..layers.head import Head
from ..layers.moe.experts import Experts
from ..layers.plain import plain, why_not_plain
from ..layers.residual import Residual
from ..model import MoEMamba
from .prefill import Group
from .prepared import PreparedStep, prepared
from .slots import Slots

EAGER = 2  # steps of as many rows before the one that is captured: they compile the kernels
WORTHWHILE = 8  # tokens that are to come from which on capturing pays, which takes about as long as a few steps
FEWER = 128  # the same, for a graph of fewer rows than one that there is


@dataclass
class _Graph:
    """A captured step, and where it leaves what it computed."""

    graph: "torch.cuda.CUDAGraph"
    hidden: Tensor
    logits: Tensor | None


class Stepper:
    """Computes steps of the rows in `slots`.

    Args:
        captures: record steps as CUDA graphs.
        padded: compute as many rows as graphs have, the last of them for nothing, also where nothing is captured.
    """

    def __init__(self, slots: Slots, captures: bool, padded: bool):
        self.slots, self.captures, self.padded = slots, captures, padded
        self.graphs: dict[tuple[int, bool], _Graph] = {}
        self._seen: dict[tuple[int, bool], int] = {}
        self._moved = slots.moved
        self._pool: Any = None
        self._prepared: PreparedStep | None = None

    def step(
        self, model: MoEMamba, greedy: bool, left: int, groups: Sequence[Group] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """A token of each live row, whose state changes.

        Args:
            greedy: choose the most likely tokens for the slots to read next; otherwise return logits.
            left: most tokens that a live row still gets, this one included.
            groups: of prompts that are to be read; those that it costs less to read in passing have been `found` then.
        Returns:
            hidden (live, d) that the head saw, and logits (live, v) or None. The next step may overwrite both.
        """
        live = self.slots.live
        self.slots.reserve(self.slots.longest + 1)
        if self._moved != self.slots.moved:
            self._moved = self.slots.moved
            self.graphs.clear()
        rows = self._rows(live, greedy, left) if self.padded else live
        key = (rows, greedy)
        done = self.graphs.get(key)
        if done is None and self.captures and left >= WORTHWHILE and self._seen.get(key, 0) >= EAGER:
            done = self.graphs[key] = self._capture(model, *key)
        if done is not None:
            done.graph.replay()
            hidden, logits = done.hidden, done.logits
        else:
            self._seen[key] = self._seen.get(key, 0) + 1
            hidden, logits = self._compute(model, *key, groups)
        self.slots.advance()
        return hidden[:live], None if logits is None else logits[:live]

    def _rows(self, live: int, greedy: bool, left: int) -> int:
        """Rows to compute: the next power of two, or all, or what there is a graph for."""
        wanted = min(1 << (live - 1).bit_length(), self.slots.rows)
        if left < FEWER and (wanted, greedy) not in self.graphs:
            return min((rows for rows, kind in self.graphs if kind == greedy and rows >= live), default=wanted)
        return wanted

    def _compute(
        self, model: MoEMamba, rows: int, greedy: bool, groups: Sequence[Group] = ()
    ) -> tuple[Tensor, Tensor | None]:
        slots = self.slots
        tokens = slots.tokens[:rows]
        length = slots.room if self.padded else slots.longest + 1  # a graph knows no lengths
        place = slots.places[:rows].clamp(max=length - 1)  # of rows that are not live it is anything
        if self._prepared is None or self._prepared.moved != slots.moved:
            self._prepared = prepared(model, slots)
        if self._prepared is None:
            hidden = _through(model, tokens, slots.seen(length), place)
        else:
            hidden = self._prepared(tokens, length, place, groups)
        slots.places[:rows] += 1
        if not greedy:
            return hidden, model.head(hidden)
        same = plain(model.head, Head) and model.head.bias is None and model.head.weight.dtype == hidden.dtype
        fast = self.padded and same and not torch.is_autocast_enabled(hidden.device.type)
        tokens.copy_(ops.linear_argmax(hidden, model.head.weight) if fast else model.head(hidden).argmax(-1))
        return hidden, None

    def _capture(self, model: MoEMamba, rows: int, greedy: bool) -> _Graph:
        """Record a step, which computes nothing now."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden, logits = self._compute(model, rows, greedy)
        return _Graph(graph, hidden, logits)


def _through(model: MoEMamba, tokens: Tensor, mixers: list[Any], place: Tensor) -> Tensor:
    """A token of each of the first rows through the model: tokens (b,) -> (b, d) what the head sees.

    Args:
        mixers: buffers of the layers that have a state, overwritten.
        place: (b,) int64 tokens before these.
    """
    x, each = model.embedding(tokens[:, None]), iter(mixers)
    for layer in model.layers:
        assert isinstance(layer, Residual)
        own = [next(each) for letter in layer.letters if LAYERS[letter].state_type is not None]
        x = layer.step(x, own, len(tokens), place)
    hidden: Tensor = model.norm(x)[:, 0]
    return hidden


def capturable(model: MoEMamba) -> bool:
    """Whether a step can be a CUDA graph: on a GPU, and nothing waits for the host, as the reference's experts and
    those of other processes do."""
    weight = model.embedding.weight
    apart = any(getattr(module, "group", None) is not None for module in model.modules())
    waiting = apart or any(module.waits() for module in model.modules() if isinstance(module, Experts))
    return weight.is_cuda and not waiting and ops.choose("expert_feedforward", weight) != "reference"


def fingerprint(model: MoEMamba) -> tuple[object, ...]:
    """What graphs depend on besides the values in buffers: where the weights are, and what layers do."""
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    kinds = tuple(
        (id(m._parameters), type(m), len(m._forward_hooks), len(m._forward_pre_hooks), why_not_plain(m, type(m)))
        for m in model.modules()
    )
    device = model.embedding.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    steps = ("mamba_step", "moe_step", "attention_step", "norm_linear")
    return weights, kinds, autocast, *(ops.choose(step, model.embedding.weight) for step in steps)
