"""One figure over the seeds."""

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
    def side(self) -> str:
        """Of a difference: "lower", "higher" or "equal"."""
        return "lower" if self.mean < 0 else "higher" if self.mean > 0 else "equal"

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
