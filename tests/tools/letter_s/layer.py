"""A running mean of what was seen, with decays that are learned."""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..letters.smoothing import width
from ..ops.packing import boundaries
from .layer import Layer, Result
from .linear import Linear
from .roles import VECTOR, Role, composed

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..tensors import Stored


class SmoothingState(NamedTuple):
    """The mean so far."""

    mean: Tensor
    """(b, c)"""


class Smoothing(Layer):
    """`out_proj(mean of in_proj(x))`."""

    state_type, state_kind = SmoothingState, "smoothing"

    def __init__(self, d_model: int, channels: int):
        super().__init__()
        self.in_proj = Linear(d_model, channels, bias=False)
        self.decay = nn.Parameter(torch.zeros(channels, 1))
        self.out_proj = Linear(channels, d_model, bias=False)

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        return cls(config.d_model, width(config))

    def roles(self) -> dict[str, Role]:
        return composed(self, "out_proj") | {"decay": VECTOR}

    @classmethod
    def fit(cls, *stored: "Stored") -> bool:
        (mean,) = stored
        return len(mean.shape) == 2 and mean.dtype.is_floating_point

    def forward(
        self,
        x: Tensor,
        state: SmoothingState | None = None,
        seq_idx: Tensor | None = None,
        record: Any = None,
    ) -> Result:
        u, decay = self.in_proj(x), self.decay[:, 0].sigmoid()
        ids = torch.zeros(x.shape[:2], dtype=torch.int64) if seq_idx is None else seq_idx
        (valid, starts), means = boundaries(ids), []
        mean = u.new_zeros(len(x), u.shape[2]) if state is None else state.mean.to(u.dtype)
        for t in range(x.shape[1]):
            mean = mean.masked_fill(starts[:, t, None], 0)
            mean = torch.where(valid[:, t, None], decay * mean + (1 - decay) * u[:, t], mean)
            means.append(mean.masked_fill(~valid[:, t, None], 0))
        y = torch.stack(means, dim=1) if means else u
        return self.out_proj(y), SmoothingState(mean), ()
