"""S: a running mean of what was seen, with decays that are learned."""

from dataclasses import dataclass

from ..reading import validate
from .letter import Letter
from .options import Options


@dataclass(frozen=True)
class SmoothingConfig(Options):
    """A running mean, letter `S`."""

    d_smooth: int | None = None
    """channels; d_model if None"""

    def __post_init__(self):
        validate(self, positive=("d_smooth",))


def width(config):
    return config.smoothing.d_smooth or config.d_model


class Smoothing(Letter):
    name, parts = "smoothing", ("smoothing",)

    def check(self, config):
        if width(config) > 999:
            raise ValueError(f"d_smooth is {width(config)}; choose at most 999")

    def parameters(self, config):
        return ((2 * config.d_model + 1) * width(config),) * 2

    def flops(self, config, context):
        return 4 * width(config)

    def state_bytes(self, config, context, element):
        return element * width(config)

    def widths(self, config):
        return {"smoothing.d_smooth": width(config)}

    def describe(self, config):
        return f"smoothing: {width(config)} channels"
