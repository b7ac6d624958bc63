"""What a comparison that reproduces a table of the paper knows beside its runs: the paper's side, and the tuning."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from .claims import Claim
from .stored import StoredPaper, rates


@dataclass(frozen=True)
class Tuning:
    """What trying learning rates with one model found."""

    losses: Mapping[float, float]
    """held-out loss of each rate at the end of its run; infinite where it diverged"""

    @property
    def chosen(self) -> float:
        """The rate that ended lowest; of equals the lowest."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    @property
    def beyond(self) -> float | None:
        """The rate to try next: twice or half the chosen one if that is the highest or lowest tried; else None."""
        if self.chosen == min(self.losses):
            return self.chosen / 2
        return self.chosen * 2 if self.chosen == max(self.losses) else None

    def to_dict(self) -> dict[str, Any]:
        losses = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in sorted(self.losses.items())}
        return {"chosen": self.chosen, "at the edge": self.beyond is not None, "losses": losses}


@dataclass(frozen=True)
class Reproduction:
    """The paper's numbers and claims, and how the learning rates were chosen."""

    title: str
    printed: Mapping[str, float]
    """the paper's losses by model, in nats: smoothed training loss"""
    faster: Mapping[str, float]
    """its speed-up over the baseline in steps, where it gives one"""
    claims: tuple[Claim, ...]
    tuning_steps: int
    tunings: Mapping[str, Tuning]
    """by model; empty if rates were given"""

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("title", "printed", "faster", "tuning_steps")},
            "claims": [asdict(claim) for claim in self.claims],
            "tunings": {name: tuning.to_dict() for name, tuning in self.tunings.items()},
        }

    @classmethod
    def of(cls, paper: StoredPaper) -> Self:
        """The checked side of the paper in a `results.json`."""
        tunings = {name: Tuning(rates(tuning)) for name, tuning in paper.tunings.items()}
        return cls(paper.title, paper.printed, paper.faster, paper.claims, paper.tuning_steps, tunings)
