"""F: the dense feed-forward layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..marks import documented
from ..reading import validate
from .experts import GATED, Activation, up_rows
from .letter import Letter
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig


@documented
@dataclass(frozen=True)
class FeedForwardConfig(Options):
    """A dense feed-forward layer, letter `F`."""

    d_ff: int | None = None
    """hidden width; if None, such that the layer has 8 d_model^2 weights"""
    activation: Activation = "swiglu"
    """nonlinearity between the two matrices"""
    bias: bool = False
    """biases in its matrices"""

    def __post_init__(self) -> None:
        validate(self, positive=("d_ff",))

    def width(self, d_model: int) -> int:
        return self.d_ff or (8 * d_model // 3 if self.activation in GATED else 4 * d_model)


class FeedForward(Letter):
    name, parts = "feed-forward", ("feedforward",)

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        rows = up_rows(config.d_ff, config.feedforward.activation)
        bias = rows + config.d_model if config.feedforward.bias else 0
        return (config.d_model * rows + config.d_ff * config.d_model + bias,) * 2

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"feedforward.d_ff": config.d_ff}

    def describe(self, config: "ModelConfig") -> str:
        return f"feed-forward: {config.d_ff} {config.feedforward.activation}"
