"""Decoding on a GPU: one token of every row as a CUDA graph, replayed.

A step of eager calls is bound by the host, which launches hundreds of small kernels. The graph reads and writes buffers
of its own, among them the state; to the outside the state stays a value. Attention's keys and values lie in buffers
with room for all tokens that are asked for, entries yet to come marked as not of the sequence.

A model keeps the last decoder that it used until its next use (with the memory of one state), so that generating again
with as many rows captures nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from .. import ops
from ..layers import LAYERS, AttentionState
from ..layers.head import Head
from ..layers.plain import plain, why_not_plain
from ..layers.residual import Residual
from ..model import MoEMamba
from ..state import State
from .evaluation import expect_numbers

CHECK = 32  # steps after which the last is looked at: what is not finite stays so, in the state
ROOM = 256  # keys and values are kept in buffers of a multiple of this

_idle: WeakKeyDictionary[MoEMamba, "Decoder"] = WeakKeyDictionary()


class Decoder:
    """Buffers and graph of one step, for a number of rows.

    Args:
        model: in evaluation mode, on the device; its parameters must stay where they are.
        state: of the rows; its shapes and dtypes are what counts here.
        room: tokens that attention can hold.
        greedy: the most likely token is chosen in the graph; otherwise it leaves logits.
    """

    def __init__(self, model: MoEMamba, state: State, room: int, greedy: bool):
        self._model, self.greedy, self.key = ref(model), greedy, _key(model, state, greedy)
        batch, device = state.batch_size, model.embedding.weight.device
        self._kinds = [
            LAYERS[letter] for layers in model.config.layers for letter in layers if LAYERS[letter].state_type
        ]
        buffers = (kind.allocate(batch, room, mixer) for kind, mixer in zip(self._kinds, state.mixers, strict=True))
        self.state = State(tuple(buffers))
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.place = torch.zeros(batch, dtype=torch.int64, device=device)  # of the next entry of keys and values
        self.history = torch.zeros(room, batch, dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # of the next row of history
        self.hidden: Tensor | None = None  # (b, d) what the head saw in the last step
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, model: MoEMamba, state: State) -> None:
        """Take over a state, copying it, of a model that `key` fits."""
        self._model = ref(model)
        for kind, buffers, mixer in zip(self._kinds, self.state.mixers, state.mixers, strict=True):
            kind.put(buffers, slice(None), mixer)
        self.place.fill_(_length(state))
        self.index.zero_()

    def capture(self) -> None:
        """Record the step. It runs once before, so that kernels are compiled; buffers hold anything afterwards."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def advance(self) -> None:
        """The next step, captured if there is a graph."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def step(self) -> None:
        """One token of every row: from `token`, change the state, and leave the next `token`, or `logits`."""
        model = self._model()
        assert model is not None
        x, mixers = model.embedding(self.token[:, None]), iter(self.state.mixers)
        for layer in model.layers:
            assert isinstance(layer, Residual)
            own = [next(mixers) for letter in layer.letters if LAYERS[letter].state_type]
            x = layer.step(x, own, len(x), self.place)
        self.hidden = hidden = model.norm(x)[:, 0]
        self.place += 1
        if not self.greedy:
            self.logits = model.head(hidden)
            return
        same = plain(model.head, Head) and model.head.weight.dtype == hidden.dtype
        fast = same and not torch.is_autocast_enabled(hidden.device.type)
        self.put(ops.linear_argmax(hidden, model.head.weight) if fast else model.head(hidden).argmax(-1))

    def put(self, chosen: Tensor) -> None:
        """The next tokens (b,), which are also written down."""
        self.token.copy_(chosen)
        self.history.index_copy_(0, self.index, chosen[None])
        self.index += 1

    def tokens(self, first: Tensor, count: int, choose: Callable[[Tensor, int], Tensor]) -> Iterator[list[int]]:
        """`first` (b,) and what follows, `count` tokens a row. The GPU computes the next token while one is read.

        Args:
            choose: tokens by logits and the number of their step, if not the most likely.
        Raises:
            FloatingPointError: the model's output is not finite.
        """
        here = torch.empty(self.history.shape, dtype=torch.int64, pin_memory=first.is_cuda)
        reader = torch.cuda.Stream() if first.is_cuda else None
        self.put(first)
        for row in range(count):
            ready = None
            if reader is not None:
                reader.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(reader):
                    here[row].copy_(self.history[row], non_blocking=True)
                    ready = torch.cuda.Event()
                    ready.record()
            else:
                here[row] = self.history[row]
            if row + 1 < count:
                self.advance()
                if self.logits is not None:
                    self.put(choose(self.logits, row + 1))
                if (row + 1) % CHECK == 0 or row + 2 == count:
                    assert self.hidden is not None
                    expect_numbers(self.hidden, row + 1)
            if ready is not None:
                ready.synchronize()
            yield here[row].tolist()


def _length(state: State) -> int:
    """Entries of the keys, padding included; 0 without attention."""
    return max((mixer[0].shape[2] for mixer in state.mixers if isinstance(mixer, AttentionState)), default=0)


def capturable(model: MoEMamba) -> bool:
    """Whether a step can be a CUDA graph: on a GPU, and nothing waits for the host, as the reference's experts and
    those of other processes do."""
    weight = model.embedding.weight
    apart = any(getattr(module, "group", None) is not None for module in model.modules())
    return weight.is_cuda and not apart and ops.choose("expert_feedforward", weight) != "reference"


@contextmanager
def claim(model: MoEMamba, state: State, count: int, greedy: bool, owner: MoEMamba | None = None) -> Iterator[Decoder]:
    """A decoder that begins with this state, with room for `count` more tokens: an idle one, or a new one.

    Args:
        owner: the model that keeps the decoder until its next use, if `model` is a view of it that soon is gone.
    """
    owner = owner or model
    room = -(-(_length(state) + count) // ROOM) * ROOM
    decoder = _idle.pop(owner, None)  # nobody else may use it in the meantime
    if decoder is None or decoder.key != _key(model, state, greedy) or decoder.history.shape[0] < room:
        decoder = None  # its memory is free before the next one takes its own
        decoder = Decoder(model, state, room, greedy)
        if model.embedding.weight.is_cuda:
            decoder.capture()
    decoder.begin(model, state)
    try:
        yield decoder
    finally:
        _idle[owner] = decoder


def _key(model: MoEMamba, state: State, greedy: bool) -> tuple[object, ...]:
    """What a graph depends on besides the values in its buffers: shapes, where the weights are, and what layers do."""
    shapes = tuple(
        (type(mixer), *((t.dtype, t.shape[:2] if isinstance(mixer, AttentionState) else t.shape) for t in mixer))
        for mixer in state.mixers
    )
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    kinds = tuple(
        (id(m._parameters), type(m), len(m._forward_hooks), len(m._forward_pre_hooks), why_not_plain(m, type(m)))
        for m in model.modules()
    )
    device = model.embedding.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return greedy, shapes, weights, kinds, autocast, ops.choose("mamba_step", model.embedding.weight)
