"""S: a running mean of what was seen, with decays that are learned."""

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
class SmoothingConfig(Options):
    """A running mean, letter `S`."""

    d_smooth: int | None = None
    """channels; d_model if None"""

    def __post_init__(self) -> None:
        validate(self, positive=("d_smooth",))


def width(config: "ModelConfig") -> int:
    return config.smoothing.d_smooth or config.d_model


class Smoothing(Letter):
    name, parts = "smoothing", ("smoothing",)

    def check(self, config: "ModelConfig") -> None:
        if width(config) > 999:
            raise ValueError(f"d_smooth is {width(config)}; choose at most 999")

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        return ((2 * config.d_model + 1) * width(config),) * 2

    def flops(self, config: "ModelConfig", context: int) -> int:
        return 4 * width(config)

    def state_bytes(self, config: "ModelConfig", context: int, element: int) -> int:
        return element * width(config)

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"smoothing.d_smooth": width(config)}

    def describe(self, config: "ModelConfig") -> str:
        return f"smoothing: {width(config)} channels"
