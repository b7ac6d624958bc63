"""The dense feed-forward layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.experts import ACTIVATIONS, GATED
from .layer import Layer, Result
from .linear import Linear, fusible_norm, weights_of
from .placing import placed
from .plain import plain
from .roles import Role, composed

if TYPE_CHECKING:
    from ..config import ModelConfig


class FeedForward(Layer):
    """`down_proj(activation(up_proj(x)))`.

    Args:
        d_model: width of the input, d.
        d_ff: hidden width, f.
        activation: see `ops.expert_feedforward`; of gated ones up_proj has 2f rows, the gate's first.
        bias: whether the projections have one.
        d_out: width of the output; d_model if None.
        device, dtype: of the parameters.
    """

    __call__: Callable[..., Tensor]

    @placed
    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "swiglu",
        bias: bool = False,
        d_out: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.up_proj = Linear(d_model, 2 * d_ff if activation in GATED else d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_out or d_model, bias=bias)

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        return cls(config.d_model, config.d_ff, config.feedforward.activation, config.feedforward.bias)

    @classmethod
    def call(
        cls, layer: Any, x: Tensor, state: Any = None, seq_idx: Tensor | None = None, record: Any = None
    ) -> Result:
        return layer(x), None, ()

    def roles(self) -> dict[str, Role]:
        """The paper draws both matrices."""
        found = composed(self, "down_proj")
        for name, projection in (("up_proj", self.up_proj), ("down_proj", self.down_proj)):
            found[f"{name}.weight"] = found[f"{name}.weight"]._replace(fan_in=projection.in_features)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y: Tensor = self.down_proj(ops.activate(self.up_proj(x), self.activation))
        return y

    def positionwise(self) -> bool:
        return plain(self, FeedForward)

    def step_with_norm(self, x: Tensor, norm: nn.Module, buffers: Any, live: int, place: Tensor) -> Tensor | None:
        up, down = weights_of(self.up_proj), weights_of(self.down_proj)
        if not plain(self, FeedForward) or up is None or down is None:
            return None
        normed = fusible_norm(norm, x, up[0], down[0])
        if normed is None:
            return None
        weight, bias, eps = normed
        h = ops.norm_linear(x[:, 0], *up, weight, bias, eps=eps, activation=self.activation)
        return ops.linear_add(h, *down, x[:, 0])[:, None]
