"""What a run wrote down: its metrics read back, smoothed, and crossed with a level."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[float, float]]  # (step, value), by increasing step


@dataclass(frozen=True)
class History:
    """The lines of a `metrics.jsonl`, by kind, each in order of its step."""

    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    router: list[dict[str, Any]]
    failure: list[dict[str, Any]] = field(default_factory=list)
    """where the run diverged; a resumption takes the line away"""

    def curve(self, kind: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of one figure, such as `curve("evaluation", "loss")`; lines without it are left out."""
        return [(line["step"], line[key]) for line in getattr(self, kind) if key in line]


def read_history(run: Path) -> History:
    """The metrics of a run directory.

    Raises:
        ValueError: a line before the last is not JSON.
        OSError: there is no `metrics.jsonl`.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "evaluation": [], "router": [], "failure": []}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run that is still writing, or was killed while it did
                break
            raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove the line or the run") from None
        kinds.setdefault(line["kind"], []).append(line)
    return History(kinds["train"], kinds["evaluation"], kinds["router"], kinds["failure"])


def smoothed(curve: Curve, span: int) -> list[tuple[float, float]]:
    """Exponential moving average over about `span` points, corrected for its start."""
    decay, average, weight = 1 - 1 / max(span, 1), 0.0, 0.0
    result = []
    for step, value in curve:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append((step, average / weight))
    return result


def crossing(curve: Curve, level: float) -> float | None:
    """The step at which a curve first comes down to a level, interpolated between its points; None if it never does."""
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= level:
            if before is None or value == level:
                return step
            share = (before[1] - level) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def speed_up(baseline: Curve, curve: Curve) -> list[tuple[float, float]]:
    """How many times fewer steps a curve needs for the lowest loss that the baseline has reached, at each of its steps.

    The measure of the paper (MoE-Mamba, appendix D): steps of the baseline over steps of the other, at equal loss.
    Levels that the other never reached are left out.
    """
    result, level = [], float("inf")
    for step, value in baseline:
        level = min(level, value)
        ours, theirs = crossing(curve, level), crossing(baseline, level)
        if ours and theirs:
            result.append((step, theirs / ours))
    return result
