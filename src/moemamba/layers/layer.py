"""What every layer of a pattern does, whatever its letter."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .roles import Role, composed

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..tensors import Stored
    from .moe.routing import Choice, RouterStats

Result = tuple[Tensor, Any, "tuple[RouterStats, ...]"]
"""y (b, l, d), the state that continues x, None for a layer that has none, and what each router did"""


Prepared = Callable[[int, int, Tensor], None]


class Layer(nn.Module):
    """A layer of the pattern: `forward(x, state=None, seq_idx=None, record=None) -> (y, state, stats)`.

    x (b, l, d), seq_idx (b, l); `record` is a list that each router appends its choices to. The layers with public
    names return what they have instead (`Mamba` no statistics, `MoE` no state); `call` is the one place that knows.

    An engine decodes many sequences from buffers, which hold a state of `rows` sequences with room for `room` tokens
    each, and are changed in place: `allocate`, `put`, `take`, `move`, `within`, `step`. For a state that does not grow,
    and where nothing is fused, a layer need not say anything about them.

    Attributes:
        state_type: what it remembers of b sequences, a NamedTuple of tensors (b, ...); None for nothing.
        state_kind: what that is called in files.
        padding_is_zero: True where whoever calls the layer sees to it, as the model does once for all layers.
    """

    state_type: ClassVar[type[Any] | None] = None
    state_kind: ClassVar[str] = ""
    padding_is_zero = False

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        raise NotImplementedError

    @classmethod
    def call(
        cls,
        layer: Callable[..., Any],
        x: Tensor,
        state: Any = None,
        seq_idx: Tensor | None = None,
        record: "list[Choice] | None" = None,
    ) -> Result:
        """What `layer`, one of these or what has been put in its place, makes of x."""
        return layer(x, state, seq_idx, record)  # type: ignore[no-any-return]

    def roles(self) -> dict[str, Role]:
        """The role of each parameter, by its name in the layer."""
        return composed(self)

    @classmethod
    def fit(cls, *stored: "Stored") -> bool:
        """Whether what was read of a state, one tensor a field, has shapes and dtypes that belong together."""
        return True

    @classmethod
    def allocate(cls, rows: int, room: int, like: Any) -> Any:
        """Zeros for `rows` sequences; widths, dtypes and device are those of a state of any rows."""
        return type(like)(*(tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in like))

    @classmethod
    def put(cls, buffers: Any, rows: slice, state: Any) -> None:
        """Write a state, of as many sequences, into some rows."""
        for buffer, tensor in zip(buffers, state, strict=True):
            buffer[rows] = tensor

    @classmethod
    def take(cls, buffers: Any, rows: slice, length: int) -> Any:
        """The state of some rows, a copy; of each the first `length` tokens that were put or stepped through."""
        return type(buffers)(*(buffer[rows].clone() for buffer in buffers))

    @classmethod
    def move(cls, buffers: Any, source: Tensor, target: Tensor) -> None:
        """Write some rows (k,) int64 over as many others."""
        for buffer in buffers:
            buffer.index_copy_(0, target, buffer[source])

    @classmethod
    def keep(cls, state: Any, rows: Tensor) -> Any:
        """The state in rows, (b,) or () bool; in the others the one before any token."""

        def one(tensor: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *(1,) * (tensor.ndim - 1)) if rows.ndim else rows, tensor, 0)

        return type(state)(*map(one, state))

    @classmethod
    def length(cls, state: Any) -> int:
        """Entries of a state that grows with its sequence; 0 of one that does not."""
        return 0

    @classmethod
    def within(cls, buffers: Any, room: int) -> Any:
        """Views of buffers with room for no more than `room` tokens."""
        return buffers

    @classmethod
    def join(cls, states: Sequence[Any]) -> Any:
        """The rows of several states, one after the other."""
        return type(states[0])(*(torch.cat(tensors) for tensors in zip(*states, strict=True)))

    @classmethod
    def store(cls, buffers: Any, after: Any, live: int, place: Tensor) -> None:
        """Write what one token made of the state of rows 0..live-1; see `step`."""
        for buffer, tensor in zip(buffers, after, strict=True):
            buffer[:live].copy_(tensor)

    @classmethod
    def step_by_call(cls, layer: Callable[..., Any], x: Tensor, buffers: Any, live: int, place: Tensor) -> Tensor:
        """`step` of a layer, or of what has been put in its place, by calling it."""
        before = None if buffers is None else type(buffers)(*(buffer[:live] for buffer in buffers))
        y, after, _ = cls.call(layer, x, before)
        if buffers is not None:
            cls.store(buffers, after, live, place)
        return y

    def step(self, x: Tensor, buffers: Any, live: int, place: Tensor) -> Tensor:
        """One token of each of the rows 0..live-1, whose states are overwritten.

        Args:
            x: (live, 1, d).
            buffers: of this layer; None for a layer without a state.
            place: (live,) int64 tokens before this one, as `put` and `step` count them, padding included.
        Returns:
            (live, 1, d)
        """
        return self.step_by_call(self, x, buffers, live, place)

    def positionwise(self) -> bool:
        """Whether `forward` makes of each position what it makes of it alone, so that those of any sequences may be
        one batch."""
        return False

    def prepare(self, buffers: Any, x: Tensor, y: Tensor) -> "Prepared":
        """`step` over and over for the first rows of x (rows, d), with what stays the same looked up beforehand.

        Returns:
            a function of how many rows, of the room that they need (see `within`) and of their places, which adds to
            y (rows, d). It holds as long as the layer, its weights and the buffers stay where they are.
        """
        return self.prepare_by_step(self, buffers, x, y)

    @classmethod
    def prepare_by_step(cls, layer: Any, buffers: Any, x: Tensor, y: Tensor) -> "Prepared":
        """`prepare` of a layer, or of what has been put in its place, by its step or by calling it."""
        step = layer.step if isinstance(layer, cls) else partial(cls.step_by_call, layer)

        def add(live: int, room: int, place: Tensor) -> None:
            own = None if buffers is None else cls.within(buffers, room)
            y[:live].add_(step(x[:live, None], own, live, place)[:, 0])

        return add

    def step_with_norm(self, x: Tensor, norm: nn.Module, buffers: Any, live: int, place: Tensor) -> Tensor | None:
        """`x + step(norm(x))` in few kernels, where there are some; None, having changed nothing, elsewhere."""
        return None
