"""What a letter of the pattern means where nothing is built."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import ModelConfig
    from .experts import ExpertsConfig


class Letter:
    """What is known of a letter without torch; a letter overrides what is not nothing.

    Attributes:
        name: for people, in messages.
        parts: the fields of `ModelConfig` whose options it reads.
    """

    name: str
    parts: tuple[str, ...] = ()

    def check(self, config: "ModelConfig") -> None:
        """Raises ValueError if a model with this letter cannot work, with the field to change."""

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        """Of one layer: in all, and those that one token passes through."""
        raise NotImplementedError

    def flops(self, config: "ModelConfig", context: int) -> int:
        """Operations of one token besides its products with active weights."""
        return 0

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        """Of one sequence after `context` tokens, where activations take `element` bytes each."""
        return 0

    def routers(self, config: "ModelConfig") -> "tuple[ExpertsConfig, ...]":
        """The experts that each router of one layer serves."""
        return ()

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        """The fields that may be None, as "mamba.dt_rank", with the values that they then have."""
        return {}

    def describe(self, config: "ModelConfig") -> str:
        """For `moemamba info`."""
        return self.name

    def why_unused(self, name: str) -> str:
        """When this letter would use a field of its options that it does not use now; empty if never."""
        return ""
