"""How the next token is chosen. No torch here."""

from dataclasses import dataclass
from typing import TypedDict

from ..marks import documented

LARGEST = 100
"""what a penalty or a bias can take from a logit or add to it: more is as good as never or always"""


@documented
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; each restriction applies to what the one before it left.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    """how random the choice is: 0 always takes the most likely token, 1 follows the model's probabilities"""
    top_k: int | None = None
    """choose among the k most likely tokens only; among all if None"""
    top_p: float | None = None
    """choose among the fewest tokens that together have this probability; among all if None"""
    min_p: float | None = None
    """choose among tokens at least this fraction as likely as the most likely one; among all if None"""
    presence_penalty: float = 0.0
    """taken from the logit of each token that the answer has already; above 0 brings new ones"""
    frequency_penalty: float = 0.0
    """taken from the logit of each token for every time that the answer has it already"""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) <= LARGEST:
                raise ValueError(f"{name} is {value}; it must be from -{LARGEST} to {LARGEST}")


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, for those who hand them on by name: `def f(**options: Unpack[SamplingOptions])`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float
    frequency_penalty: float
