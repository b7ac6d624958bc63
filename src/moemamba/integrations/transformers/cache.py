"""`State` as a cache of transformers."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ...state import State


class StateCache(Cache):  # type: ignore[misc]
    """What a model remembers between two calls: its `State`, which each call replaces by the next.

    Attributes:
        state: None before the first call.
        seen: positions so far, padding included.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: State | None = None, seen: int = 0):
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    def __repr__(self) -> str:
        return f"StateCache(seen={self.seen})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.mixers)

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer whether it knows no length, as transformers asks; this cache does."""
        return [False]

    @property
    def is_initialized(self) -> bool:
        """Whether there has been a call."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call, as transformers has it."""
        return -1 if self.state is None else self.state.batch_size

    def advance(self, state: State, length: int) -> None:
        """What a call of `length` positions leaves."""
        self.state, self.seen = state, self.seen + length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions so far."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None is the longest."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """As `get_max_length`, by its former name."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask has columns for, and the first of them."""
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there has been a call."""
        return self.state is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row j becomes what row beam_idx[j] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows of these numbers alone."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, side by side."""
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def reset(self) -> None:
        """As before the first call."""
        self.state, self.seen = None, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises RuntimeError: what has been read cannot be taken back."""
        raise RuntimeError(
            "the state of a recurrent model cannot be cropped; keep a copy of it (cache.state is a value) and go on "
            "from there"
        )
