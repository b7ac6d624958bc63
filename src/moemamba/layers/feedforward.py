"""The dense feed-forward layer."""

from torch import Tensor, nn

from ..ops.experts import ACTIVATIONS
from .linear import Linear


class FeedForward(nn.Module):
    """`down_proj(activation(up_proj(x)))`.

    Args:
        d_model: width of the input, d.
        d_ff: hidden width, f.
        activation: "relu", "gelu" (tanh approximation), "silu", or "swiglu" (up_proj has 2f rows, the gate's first).
        bias: whether the projections have one.
        d_out: width of the output; d_model if None.
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "swiglu", bias: bool = False, d_out: int | None = None
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.up_proj = Linear(d_model, 2 * d_ff if activation == "swiglu" else d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_out or d_model, bias=bias)

    def residual_weights(self) -> list[Tensor]:
        """The weights whose products are the layer's output."""
        return [self.down_proj.weight]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y: Tensor = self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
        return y
