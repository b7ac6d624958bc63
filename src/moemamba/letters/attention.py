"""A: causal self-attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..marks import documented, later
from ..reading import validate
from .letter import Letter
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig


@documented
@dataclass(frozen=True)
class AttentionConfig(Options):
    """Causal self-attention, letter `A`."""

    n_heads: int | None = None
    """attention heads; d_model / 64 (at least 1) if None"""
    rope_base: float = 10_000.0
    """base of the rotary positions: larger for longer contexts"""
    n_kv_heads: int | None = later(None)
    """heads of keys and values, each shared by n_heads / n_kv_heads of the queries' (arXiv 2305.13245); n_heads if
    None"""
    rotary: bool = later(True)
    """turn queries and keys by their position (arXiv 2104.09864); without it, order is what other layers tell"""
    qkv_bias: bool = later(False)
    """biases of queries, keys and values"""
    out_bias: bool = later(False)
    """a bias of the output"""

    def __post_init__(self) -> None:
        validate(self, positive=("n_heads", "rope_base", "n_kv_heads"))

    def heads(self, d_model: int) -> int:
        return self.n_heads or max(1, d_model // 64)

    def kv_heads(self, d_model: int) -> int:
        return self.n_kv_heads or self.heads(d_model)

    def unused(self) -> tuple[str, ...]:
        return () if self.rotary else ("rope_base",)


class Attention(Letter):
    name, parts = "attention", ("attention",)

    def check(self, config: "ModelConfig") -> None:
        even = config.attention.rotary
        if config.d_model % config.n_heads or (even and (config.d_model // config.n_heads) % 2):
            raise ValueError(
                f"n_heads is {config.n_heads}, but d_model = {config.d_model} must split into heads of "
                f"{'even' if even else 'one'} width; choose a divisor of {config.d_model // (2 if even else 1)}"
            )
        if config.n_heads % config.n_kv_heads:
            raise ValueError(
                f"n_kv_heads is {config.n_kv_heads}, but each must be shared by equally many of the {config.n_heads} "
                f"heads; choose a divisor of {config.n_heads}"
            )

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        keys, options = self.keys(config), config.attention
        biases = options.qkv_bias * (config.d_model + 2 * keys) + options.out_bias * config.d_model
        return (2 * config.d_model * (config.d_model + keys) + biases,) * 2

    def keys(self, config: "ModelConfig") -> int:
        """Width of all heads of keys, which is that of the values."""
        return config.d_model // config.n_heads * config.n_kv_heads

    def flops(self, config: "ModelConfig", context: int) -> int:
        """The two products with `context / 2` keys and values on average."""
        return 2 * context * config.d_model

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        """Keys, values, and a position of 8 bytes, of every token."""
        return context * (2 * self.keys(config) * element + 8)

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"attention.n_heads": config.n_heads, "attention.n_kv_heads": config.n_kv_heads}

    def describe(self, config: "ModelConfig") -> str:
        shared = f", {config.n_kv_heads} of keys and values" if config.n_kv_heads < config.n_heads else ""
        return f"attention: {config.n_heads} heads{shared}{'' if config.attention.rotary else ', without positions'}"

    def why_unused(self, name: str) -> str:
        return "with rotary = True A would" if name == "rope_base" else ""
