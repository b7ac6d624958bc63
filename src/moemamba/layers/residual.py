"""One residual sub-layer: a norm and the letters that share it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.arguments import autocast
from . import LAYERS, Choice, RouterStats, make_norm
from .layer import Prepared
from .norm import prepare_norm
from .plain import plain
from .roles import Role, composed, roles


class Residual(nn.Module):
    """`x + sum of f(norm(x))` over the letters of one sub-layer, which share the norm.

    The last sum is left to whoever comes next: with the norm of the next sub-layer it is one kernel where that is
    compiled, in the forward and in the backward pass.
    """

    def __init__(self, configs: Sequence[ModelConfig], letters: str):
        """`configs`: what each letter is built from (`ModelConfig.sublayers`)."""
        super().__init__()
        self.letters = letters
        config = configs[0]
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.branches = nn.ModuleList(LAYERS[letter].build(own) for letter, own in zip(letters, configs, strict=True))
        for layer in self.branches:
            layer.padding_is_zero = True  # type: ignore[assignment]  # the model sees to it

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        states: tuple[Any, ...] | None,
        seq_idx: Tensor | None,
        record: list[Choice] | None = None,
    ) -> tuple[Tensor, Tensor, list[Any], list[RouterStats]]:
        """x (b, l, d) and what is still to be added to it -> the same; `states` begins with those of its mixers."""
        x = x if y is None else x + y
        y = None
        h = autocast(self.norm(x))  # the norm's float32 would otherwise be read by every branch
        after: list[Any] = []
        stats: list[RouterStats] = []
        for letter, layer in zip(self.letters, self.branches, strict=True):
            x = x if y is None else x + y
            kind = LAYERS[letter]
            before = None if states is None or kind.state_type is None else states[len(after)]
            y, new, routed = kind.call(layer, h, before, seq_idx, record)
            if kind.state_type is not None:
                after.append(new)
            stats += routed
        assert y is not None  # a sub-layer has one letter at least
        return x, y, after, stats

    def roles(self) -> dict[str, Role]:
        """The role of each parameter, by its name; what its layers write is what it writes."""
        found = composed(self)
        for number, layer in enumerate(self.branches):
            found |= {f"branches.{number}.{name}": role for name, role in roles(layer).items()}
        return found

    def step(self, x: Tensor, buffers: Sequence[Any], live: int, place: Tensor) -> Tensor:
        """One token of each of the rows 0..live-1, with the residual sum: x (live, 1, d) -> the same.

        Args:
            buffers: those of its mixers, overwritten; see `Layer.step`.
            place: (live,) int64 tokens before this one.
        """
        mixers = iter(buffers)
        own = [None if LAYERS[letter].state_type is None else next(mixers) for letter in self.letters]
        if plain(self, Residual):
            return self._step(x, own, live, place)
        before = tuple(type(each)(*(buffer[:live] for buffer in each)) for each in buffers)
        x, y, after, _ = self(x, None, before, None)
        new = iter(after)
        for letter, each in zip(self.letters, own, strict=True):
            if each is not None:
                LAYERS[letter].store(each, next(new), live, place)
        return x + y

    def prepare(
        self, buffers: Sequence[Any], x: Tensor, h: Tensor, rows: int
    ) -> tuple[Callable[[int], None], list[Prepared]]:
        """`step` over and over for the first rows of x (n, d), which it changes in place; see `Layer.prepare`.

        It holds as long as this is what it was built as.

        Args:
            buffers: those of its mixers.
            h: (n, d) room.
            rows: that steps are made of, n at most; of the others h can be had too.
        Returns:
            a function of how many rows, which makes h of x, and one for each letter, to be called in turn.
        """
        mixers, steps, source, target = iter(buffers), [], h[:rows], x[:rows]
        for letter, layer in zip(self.letters, self.branches, strict=True):
            kind = LAYERS[letter]
            own = None if kind.state_type is None else next(mixers)
            prepare = layer.prepare if isinstance(layer, kind) else partial(kind.prepare_by_step, layer)
            steps.append(prepare(own, source, target))
        return prepare_norm(self.norm, x, h), steps

    def _step(self, x: Tensor, buffers: list[Any], live: int, place: Tensor) -> Tensor:
        """`step` of a sub-layer that is what it was built as, though its layers may not be."""
        first = self.branches[0]
        if len(self.branches) == 1 and isinstance(first, LAYERS[self.letters]):
            y = first.step_with_norm(x, self.norm, buffers[0], live, place)
            if y is not None:
                return y
        h = autocast(self.norm(x))
        for letter, layer, own in zip(self.letters, self.branches, buffers, strict=True):
            kind = LAYERS[letter]
            if isinstance(layer, kind):
                x = x + layer.step(h, own, live, place)
            else:
                x = x + kind.step_by_call(layer, h, own, live, place)
        return x
