"""What the paper says of two models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One model is said to be better than another."""

    better: str
    worse: str
    accuracy: bool = False
    """in its share of tokens predicted right, not in its loss"""
