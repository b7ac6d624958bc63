"""How the next token is chosen. No torch here."""

from dataclasses import dataclass

LEAST = 1e-6  # temperature by which float32 logits can be divided


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; each restriction applies to what the one before it left.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    """0 takes the most likely token"""
    top_k: int | None = None
    """only the k most likely tokens"""
    top_p: float | None = None
    """only the fewest tokens that together have this probability"""
    min_p: float | None = None
    """only tokens at least this fraction as likely as the most likely one"""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or self.temperature >= LEAST):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (most likely token), or {LEAST:g} or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
