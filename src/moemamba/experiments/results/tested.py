"""What a finished run came to on the text that nothing was chosen by, and what that says of two models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ...training.blocks import standard_error
from .stored import StoredTest, is_figure

FIGURES = ("tokens", "loss", "bits_per_byte", "accuracy", "drop_gap", "averaged")


@dataclass(frozen=True)
class Test:
    """Held-out figures of a whole text, or of the half of one on which no rate was chosen."""

    tokens: int
    loss: float
    """nats per token, dropless"""
    drop_gap: float
    """what the capacity limits of training add to it; 0 without any"""
    bits_per_byte: float | None
    accuracy: float | None
    blocks: tuple[tuple[float, float], ...]
    """weight in the mean and loss of each block of consecutive windows, the same windows for every model"""
    averaged: float | None = None
    """loss of the averaged weights, dropless; None for a run without"""

    __test__ = False  # pytest takes what is called so for a test

    @property
    def capped_loss(self) -> float:
        """With the capacity limits of training."""
        return self.loss + self.drop_gap

    @property
    def standard_error(self) -> float | None:
        """Of the loss over the text: what another text of its kind would change. None of fewer than two blocks."""
        return standard_error(self.blocks)

    @classmethod
    def condensed(cls, lines: Sequence[Mapping[str, Any]], step: int) -> Self | None:
        """The line of `metrics.jsonl` about a run that ended at a step, rounded; None if it has none."""
        line = next((line for line in reversed(lines) if line["step"] == step and is_figure(line.get("loss"))), None)
        if line is None or not is_figure(line.get("tokens")) or not line["tokens"] >= 1:
            return None
        figures = {key: round(line[key], 6) for key in FIGURES if is_figure(line.get(key))}
        figures["tokens"] = int(line["tokens"])
        blocks = line.get("blocks")
        pairs = blocks if isinstance(blocks, list) else []
        good = all(isinstance(pair, list) and len(pair) == 2 and all(map(is_figure, pair)) for pair in pairs)
        good = good and all(0 < pair[0] <= 1 for pair in pairs)
        parts = tuple((round(weight, 9), round(loss, 6)) for weight, loss in pairs) if good else ()
        return cls.of(StoredTest(**figures, blocks=parts))

    @classmethod
    def of(cls, stored: StoredTest) -> Self:
        """What `results.json` holds, checked."""
        parts = tuple((weight, loss) for weight, loss in stored.blocks)
        gap = stored.drop_gap or 0.0
        return cls(stored.tokens, stored.loss, gap, stored.bits_per_byte, stored.accuracy, parts, stored.averaged)

    def to_dict(self) -> dict[str, Any]:
        named = {key: value for key in FIGURES if (value := getattr(self, key)) is not None}
        return {**named, "blocks": [list(block) for block in self.blocks]}


def error_of_difference(ours: Test | None, theirs: Test | None) -> float | None:
    """Standard error over the text of one model's loss minus another's, block by block; None where they cannot be
    paired. It knows nothing of what another seed would change."""
    if ours is None or theirs is None or [w for w, _ in ours.blocks] != [w for w, _ in theirs.blocks]:
        return None
    return standard_error([(w, a - b) for (w, a), (_, b) in zip(ours.blocks, theirs.blocks, strict=True)])
