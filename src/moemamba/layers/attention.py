"""Causal self-attention."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.arguments import autocasts, readable, sizes
from ..ops.packing import boundaries, positions, without_padding
from .layer import Layer, Result
from .linear import Linear, fusible_norm, weights_of
from .placing import placed
from .plain import plain
from .quantised import weight_of
from .roles import MATRIX, Role, composed

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..tensors import Stored


class AttentionState(NamedTuple):
    """The keys and values of the tokens so far; unlike Mamba's state it grows with them."""

    keys: Tensor
    """(b, g, s, d/h) of g heads, rotated where positions are"""
    values: Tensor
    """(b, g, s, d/h)"""
    positions: Tensor
    """(b, s) int64 position of each entry in the row's current sequence; -1 for entries that are not of it"""

    def select(self, rows: "Tensor | list[int] | slice") -> "AttentionState":
        """The state of some rows, in the order given; a row may be taken more than once."""
        return AttentionState(*(tensor[rows] for tensor in self))

    def fork(self, copies: int) -> "AttentionState":
        """Each row `copies` times, one after the other."""
        return AttentionState(*(tensor.repeat_interleave(copies, dim=0) for tensor in self))

    def to(self, device: torch.device | str) -> "AttentionState":
        """The state on another device."""
        return AttentionState(*(tensor.to(device) for tensor in self))

    def detach(self) -> "AttentionState":
        """The state cut off from the graph, for truncated back-propagation."""
        return AttentionState(*(tensor.detach() for tensor in self))


class Attention(Layer):
    """Multi-head causal self-attention; rotary positions turn the pairs (x_j, x_{j + d/2h}).

    Args:
        d_model: width of input and output, d.
        n_heads: h; with rotary positions d_model / h must be even.
        rope_base: base of the rotary frequencies.
        n_kv_heads: g, heads of keys and values, each shared by h / g of the queries'; h if None.
        rotary: whether there are positions.
        qkv_bias, out_bias: whether the projections have biases.
        device, dtype: of the parameters.

    Parameters: qkv_proj (d + 2 g d/h, d), rows of queries, keys and values; out_proj (d, d).
    """

    state_type, state_kind = AttentionState, "attention"
    __call__: Callable[..., tuple[Tensor, AttentionState]]

    @placed
    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rope_base: float = 10_000.0,
        n_kv_heads: int | None = None,
        rotary: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if d_model % ((1 + rotary) * n_heads):
            even = "even" if rotary else "one"
            raise ValueError(f"n_heads is {n_heads}, but d_model = {d_model} must split into heads of {even} width")
        self.n_heads, self.rope_base, self.rotary = n_heads, rope_base, rotary
        self.n_kv_heads = n_kv_heads or n_heads
        if n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {n_kv_heads}, which must divide n_heads = {n_heads}")
        self.qkv_proj = Linear(d_model, d_model + 2 * (d_model // n_heads) * self.n_kv_heads, bias=qkv_bias)
        self.out_proj = Linear(d_model, d_model, bias=out_bias)

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        own = config.attention
        biases = own.qkv_bias, own.out_bias
        return cls(config.d_model, config.n_heads, own.rope_base, config.n_kv_heads, own.rotary, *biases)

    @classmethod
    def call(
        cls, layer: Any, x: Tensor, state: Any = None, seq_idx: Tensor | None = None, record: Any = None
    ) -> Result:
        return *layer(x, state, seq_idx), ()

    def initial_state(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state before any token, without keys, of `rows` sequences; device and dtype as the weights' if None."""
        weight = weight_of(self.out_proj, "weight")
        device, width = device or weight.device, self.out_proj.in_features // self.n_heads
        keys = torch.zeros(rows, self.n_kv_heads, 0, width, device=device, dtype=dtype or weight.dtype)
        return AttentionState(keys, keys.clone(), torch.zeros(rows, 0, dtype=torch.int64, device=device))

    def roles(self) -> dict[str, Role]:
        """The paper draws both matrices."""
        d_model = self.qkv_proj.in_features
        return composed(self, "out_proj") | {
            "qkv_proj.weight": MATRIX._replace(fan_in=d_model),
            "out_proj.weight": MATRIX._replace(fan_in=d_model, writes_residual=True),
        }

    @classmethod
    def fit(cls, *stored: "Stored") -> bool:
        keys, values, positions = stored
        shapes = len(keys.shape) == 4 and keys.shape == values.shape
        shapes = shapes and positions.shape == (keys.shape[0], keys.shape[2])
        return shapes and keys.dtype == values.dtype and keys.dtype.is_floating_point and positions.dtype == torch.int64

    @classmethod
    def allocate(cls, rows: int, room: int, like: Any) -> AttentionState:
        """Room for keys and values; entries yet to come are of no sequence."""
        keys, values, positions = like
        shape = (rows, keys.shape[1], room, keys.shape[3])
        return AttentionState(keys.new_zeros(shape), values.new_zeros(shape), positions.new_full((rows, room), -1))

    @classmethod
    def put(cls, buffers: Any, rows: slice, state: Any) -> None:
        """The first entries; those behind are emptied, lest something that is not finite remain."""
        length = state.keys.shape[2]
        keys, values, positions = (buffer[rows] for buffer in buffers)
        keys.zero_()[:, :, :length] = state.keys
        values.zero_()[:, :, :length] = state.values
        positions.fill_(-1)[:, :length] = state.positions

    @classmethod
    def take(cls, buffers: Any, rows: slice, length: int) -> AttentionState:
        keys, values, positions = (buffer[rows] for buffer in buffers)
        return AttentionState(keys[:, :, :length].clone(), values[:, :, :length].clone(), positions[:, :length].clone())

    @classmethod
    def keep(cls, state: Any, rows: Tensor) -> AttentionState:
        """Entries of other rows are of no sequence."""
        keys, values, places = super().keep(state, rows)
        return AttentionState(keys, values, places.masked_fill(~(rows[:, None] if rows.ndim else rows), -1))

    @classmethod
    def length(cls, state: Any) -> int:
        entries: int = state.keys.shape[2]
        return entries

    @classmethod
    def within(cls, buffers: Any, room: int) -> AttentionState:
        keys, values, positions = buffers
        return AttentionState(keys[:, :, :room], values[:, :, :room], positions[:, :room])

    @classmethod
    def join(cls, states: Sequence[Any]) -> Any:
        """Of different lengths, too: they end together."""
        longest = max(map(cls.length, states))

        def lengthened(state: Any) -> AttentionState:
            more = longest - cls.length(state)
            keys, values = (F.pad(tensor, (0, 0, more, 0)) for tensor in state[:2])
            return AttentionState(keys, values, F.pad(state.positions, (more, 0), value=-1))

        return super().join([lengthened(state) for state in states])

    @classmethod
    def store(cls, buffers: Any, after: Any, live: int, place: Tensor) -> None:
        """The new entry is the last."""
        rows = torch.arange(live, device=place.device)
        buffers.keys[rows, :, place] = after.keys[:, :, -1].to(buffers.keys.dtype)
        buffers.values[rows, :, place] = after.values[:, :, -1].to(buffers.values.dtype)
        buffers.positions[rows, place] = after.positions[:, -1]

    def forward(
        self, x: Tensor, state: AttentionState | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """x (b, l, d), seq_idx (b, l) -> y (b, l, d), and the state that continues it; zero output at padding."""
        batch, length, _ = sizes("x", x, "b, l, d")
        if not self.padding_is_zero:
            x = without_padding(x, seq_idx)
        lost = _not_finite(x, seq_idx)
        if lost is not None:
            x = x.masked_fill(lost[..., None], 0)
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        each = self.qkv_proj(x).unflatten(-1, (sum(heads), -1)).transpose(1, 2)  # (b, h + 2g, l, d/h)
        q, k, v = each.split(heads, 1)
        time = torch.arange(length, device=x.device)
        first = time.new_zeros(batch) if state is None else F.pad(state.positions, (1, 0), value=-1).amax(1) + 1
        place = first[:, None] + time if seq_idx is None else positions(seq_idx, first)  # (b, l)
        if self.rotary:
            q, k = (ops.rotary(x, place, self.rope_base) for x in (q, k))

        if lost is None and seq_idx is None and (state is None or _all_seen(state, x)):
            if state is not None:
                place = torch.cat([state.positions, place], dim=1)
                k, v = (torch.cat([a.to(b.dtype), b], dim=2) for a, b in ((state.keys, k), (state.values, v)))
            return self._merge(ops.attention(q, k, v)), AttentionState(k, v, place)

        valid, starts = boundaries(torch.zeros_like(place) if seq_idx is None else seq_idx)
        segment = starts.long().cumsum(1)  # 0 for the row's first sequence, which the state belongs to
        visible = (
            (segment[:, :, None] == segment[:, None]) & (time[:, None] >= time) & valid[:, None]
        )  # (b, query, key)
        visible = visible | (time[:, None] == time)  # padding sees itself, so that its softmax is defined
        current = valid & (segment == segment[:, -1:]) if length else valid
        kept = place.masked_fill(~current, -1)
        if lost is None and state is not None and seq_idx is not None and bool(_marked(state.keys).any()):
            lost = torch.zeros_like(valid)  # there are none here, but in the state
        keys, values = remembered = (k, v) if lost is None else tuple(_mark(t, lost) for t in (k, v))
        if state is not None:
            seen = (state.positions >= 0)[:, None] & (segment == 0)[:, :, None]  # (b, query, s)
            visible = torch.cat([seen, visible], dim=2)
            earlier = (state.keys.to(k.dtype), state.values.to(v.dtype))
            k, v = (torch.cat(pair, dim=2) for pair in zip(earlier, (k, v), strict=True))
            keys, values = k, v
            if lost is not None:
                keys, values = (torch.cat(pair, dim=2) for pair in zip(earlier, remembered, strict=True))
                lost = torch.cat([_marked(earlier[0]), lost], dim=1)
                k, v = (t.masked_fill(lost[:, None, :, None], 0) for t in (k, v))
            continued = (segment[:, -1:] == 0) if length else torch.ones_like(state.positions[:, :1], dtype=torch.bool)
            kept = torch.cat([state.positions.masked_fill(~continued, -1), kept], dim=1)
        y = ops.attention(q, k, v, visible)
        if lost is not None:
            y = y.masked_fill((visible & lost[:, None]).any(-1)[:, None, :, None], math.nan)
            keys, values = (t.masked_fill((kept < 0)[:, None, :, None], 0) for t in (keys, values))
        y = y.masked_fill(~valid[:, None, :, None], 0)
        return self._merge(y), AttentionState(keys, values, kept)

    def step(self, x: Tensor, buffers: Any, live: int, place: Tensor) -> Tensor:
        """In place where there is a kernel for it."""
        if torch.is_grad_enabled() or autocasts(x.device.type) or not plain(self, Attention):
            return super().step(x, buffers, live, place)
        own = self._in_place(x, buffers, live, place)
        if own is None or _not_finite(x, None) is not None:
            return super().step(x, buffers, live, place)
        y: Tensor = self.out_proj(ops.attention_step(self.qkv_proj(x)[:, 0], *own))
        return y[:, None]

    def step_with_norm(self, x: Tensor, norm: nn.Module, buffers: Any, live: int, place: Tensor) -> Tensor | None:
        enter, leave = weights_of(self.qkv_proj), weights_of(self.out_proj)
        if not plain(self, Attention) or enter is None or leave is None:
            return None
        normed, own = fusible_norm(norm, x, enter[0], leave[0]), self._in_place(x, buffers, live, place)
        if normed is None or own is None:
            return None
        weight, bias, eps = normed
        qkv = ops.norm_linear(x[:, 0], *enter, weight, bias, eps=eps)
        return ops.linear_add(ops.attention_step(qkv, *own), *leave, x[:, 0])[:, None]

    def _in_place(self, x: Tensor, buffers: Any, live: int, place: Tensor) -> tuple[Any, ...] | None:
        """What `ops.attention_step` takes besides the new queries, keys and values; None if there are no kernels."""
        own = (*(buffer[:live] for buffer in buffers), place, self.rope_base if self.rotary else None)
        return None if ops.choose("attention_step", x, *own) == "reference" else own

    def _merge(self, y: Tensor) -> Tensor:
        merged: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return merged


# A product with a weight of zero does not make vanish what is not a number. So a position that holds such counts as
# zero in the products, and only the queries that see it get NaN.


def _all_seen(state: AttentionState, x: Tensor) -> bool:
    """Whether what follows a state sees all of it, so that no mask is needed: looked for where looking is cheap."""
    return readable(x) and not torch.is_grad_enabled() and bool((state.positions >= 0).all())


def _not_finite(x: Tensor, seq_idx: Tensor | None) -> Tensor | None:
    """(b, l): the positions of x (b, l, d) that hold what is not finite; None where there are none.

    Without `seq_idx` a row is one sequence, whose later positions alone could hold such: that is looked for only where
    looking costs next to nothing, on the CPU.
    """
    x = x.detach()
    looks = readable(x)
    if x.numel() == 0 or (seq_idx is None and not looks):
        return None
    if looks:
        low, high = x.aminmax()
        if low > -math.inf and high < math.inf:  # both are NaN where there is one
            return None
    return ~x.isfinite().all(-1)


def _mark(x: Tensor, lost: Tensor) -> Tensor:
    """Keys or values as they are remembered: NaN where lost, which later queries of the sequence will see."""
    return x.masked_fill(lost[:, None, :, None], math.nan)


def _marked(keys: Tensor) -> Tensor:
    """(b, s): the entries that `_mark` marked as lost."""
    return keys[:, 0, :, 0].isnan()
