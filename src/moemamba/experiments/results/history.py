"""What a run wrote down: its metrics read back, smoothed, and crossed with a level."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...host.files import FileError, read_text
from .stored import is_figure

SIZE = 1 << 32  # bytes of a metrics.jsonl at most

Curve = Sequence[tuple[float, float]]  # (step, value), by increasing step


@dataclass(frozen=True)
class History:
    """The lines of a `metrics.jsonl`, by kind, each in order of its step."""

    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    router: list[dict[str, Any]]
    failure: list[dict[str, Any]] = field(default_factory=list)
    """where the run diverged; a resumption takes the line away"""
    data: list[dict[str, Any]] = field(default_factory=list)
    """what it read"""
    test: list[dict[str, Any]] = field(default_factory=list)
    """of finished runs, at each step that was its last"""

    def curve(self, kind: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of one figure, such as `curve("evaluation", "loss")`; lines without it, or in which it is no
        finite number, are left out."""
        return [(line["step"], line[key]) for line in getattr(self, kind) if is_figure(line.get(key))]


def read_history(run: Path) -> History:
    """The metrics of a run directory. A line that is no event of a run, or not after the one before it, is left out.

    Raises:
        ValueError: a line before the last is not JSON, or the file no text.
        OSError: there is no `metrics.jsonl`.
    """
    path = run / "metrics.jsonl"
    lines = read_text(path, SIZE).splitlines()
    kinds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in fields(History)}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a run that is still writing, or was killed while it did
                break
            raise FileError(f"{path}, line {number}, is not JSON ({error}); remove the line or the run") from None
        before = kinds.get(str(line.get("kind"))) if isinstance(line, dict) else None
        if before is not None and _follows(line.get("step"), before):
            before.append(line)
    return History(**kinds)


def _follows(step: Any, before: list[dict[str, Any]]) -> bool:
    """Whether a line of this step can stand behind others of its kind."""
    return isinstance(step, int) and is_figure(step) and step > (before[-1]["step"] if before else -1)


def smoothing(steps: int) -> float:
    """The weight of a new step in the smoothed training loss of a run of so many steps.

    The paper's 0.001; in runs shorter than those of its ablations (15,000 steps), the same share of the run as there.
    """
    return min(1.0, max(0.001, 15 / steps))


def smoothed(curve: Curve, alpha: float) -> list[tuple[float, float]]:
    """Exponential moving average with weight `alpha` a step, corrected for its start.

    A point stands for all the steps since the point before.
    """
    average, weight, last = 0.0, 0.0, 0.0
    result = []
    for step, value in curve:
        keep, last = (1 - alpha) ** (step - last), step
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append((step, average / weight))
    return result


def crossing(curve: Curve, level: float) -> float | None:
    """The step at which a curve has first come down to a level; None if it never does.

    Between points the lowest loss so far is interpolated linearly, so that a lower level is never reached sooner. A
    level above the first point counts as reached there.
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= level:
            if before is None or value == level:
                return step
            share = (before[1] - level) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value if before is None else min(value, before[1]))
    return None


def speed_up(baseline: Curve, curve: Curve) -> list[tuple[float, float]]:
    """How many times fewer steps a curve needs for the lowest loss that the baseline has reached, at each of its steps.

    The measure of the paper (MoE-Mamba, appendix D): steps of the baseline over steps of the other, at equal loss.
    Levels that the other never reached are left out, and those above its first point: when it passed them is unknown.
    """
    result, level = [], float("inf")
    for step, value in baseline:
        level = min(level, value)
        ours, theirs = crossing(curve, level), crossing(baseline, level)
        if ours and theirs and level <= curve[0][1]:
            result.append((step, theirs / ours))
    return result
