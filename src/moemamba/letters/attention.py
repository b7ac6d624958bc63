"""A: causal self-attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..marks import documented
from ..reading import validate
from .letter import Letter
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig


@documented
@dataclass(frozen=True)
class AttentionConfig(Options):
    """Causal self-attention with rotary positions, letter `A`."""

    n_heads: int | None = None
    """attention heads; d_model / 64 (at least 1) if None"""
    rope_base: float = 10_000.0
    """base of the rotary positions: larger for longer contexts"""

    def __post_init__(self) -> None:
        validate(self, positive=("n_heads", "rope_base"))

    def heads(self, d_model: int) -> int:
        return self.n_heads or max(1, d_model // 64)


class Attention(Letter):
    name, parts = "attention", ("attention",)

    def check(self, config: "ModelConfig") -> None:
        if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
            raise ValueError(
                f"n_heads is {config.n_heads}, but d_model = {config.d_model} must split into heads of even width; "
                f"choose a divisor of {config.d_model // 2}"
            )

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        return (4 * config.d_model**2,) * 2

    def flops(self, config: "ModelConfig", context: int) -> int:
        """The two products with `context / 2` keys and values on average."""
        return 2 * context * config.d_model

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        """Keys, values, and a position of 8 bytes, of every token."""
        return context * (2 * config.d_model * element + 8)

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"attention.n_heads": config.n_heads}

    def describe(self, config: "ModelConfig") -> str:
        return f"attention: {config.n_heads} heads"
