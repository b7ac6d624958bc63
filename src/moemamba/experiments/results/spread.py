"""One figure over the seeds, and figures as text."""

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds; not a number where no seed has it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None with a single seed, which says nothing about it."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None with a single seed."""
        return None if self.std is None else self.std / math.sqrt(len(self.values))

    @property
    def clear(self) -> bool:
        """Whether a difference stands out: all seeds agree on its sign, and its mean exceeds twice its standard error.

        Never with a single seed, whose noise is unknown.
        """
        error = self.standard_error
        return error is not None and self.low * self.high > 0 and abs(self.mean) > 2 * error

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        if not self.values:
            return {"values": []}
        return {"values": list(self.values), "mean": self.mean, "std": self.std, "low": self.low, "high": self.high}


def signed(difference: Spread) -> str:
    """`-0.0612 (-0.0660 … -0.0555)`: mean, then lowest and highest of the seeds; with real minus signs."""
    if not difference.values:
        return "–"
    text = f"{difference.mean:+.4f}"
    if difference.std is not None:
        text += f" ({difference.low:+.4f} … {difference.high:+.4f})"
    return text.replace("-", "−")


def times(ratio: Spread | None) -> str:
    """`1.46× (1.44 … 1.49)`"""
    if ratio is None or not ratio.values:
        return "–"
    return f"{ratio.mean:.2f}×" + (f" ({ratio.low:.2f} … {ratio.high:.2f})" if ratio.std is not None else "")


def count(n: float) -> str:
    """27131904 -> `27.1M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
