"""What a figure shows, before anything draws it: `svg` draws it for the page, `plots` with matplotlib."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..results import Curve

COLOURS = 8  # that page.css has


@dataclass(frozen=True)
class Line:
    """One curve of a chart, with an optional band from `low` to `high` (same steps) around it."""

    name: str
    colour: int
    """number of its style: one of the page's colours, and when those are used up the same dashed, then dotted"""
    points: Curve
    low: Curve = ()
    high: Curve = ()
    dots: bool = True
    """mark each point, with its value as a tooltip"""

    @property
    def dashes(self) -> int:
        """0, or 1 for dashed, or 2 for dotted."""
        return self.colour // COLOURS % 3


@dataclass(frozen=True)
class Chart:
    """Curves over tokens, or whatever `x_label` says."""

    name: str
    title: str
    """what it shows, for those who cannot see it"""
    lines: Sequence[Line]
    caption: str = ""
    x_label: str = "tokens"
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    """lowest and highest value shown, the data's own if None; what lies outside is cut off"""
    y_format: Callable[[float], str] = "{:.4f}".format
    """of a value in a tooltip, which says too where it is: the number on the x axis, or its category"""
    level: tuple[float, str] | None = None
    """a dashed horizontal line and its label"""
    categories: Sequence[tuple[str, str]] = ()
    """two lines of text for x = 0, 1, ..., instead of an axis of numbers"""
    height: float = 300
    keys: bool = False
    """names its lines itself: they are not the comparison's models"""

    @property
    def points(self) -> list[tuple[float, float]]:
        """Of all lines and bands."""
        return [point for line in self.lines for curve in (line.points, line.low, line.high) for point in curve]

    @property
    def x_limits(self) -> tuple[float, float]:
        """Where the x axis begins and ends; there must be points."""
        if self.categories:
            return -0.5, len(self.categories) - 0.5
        return 0, max(x for x, _ in self.points)

    @property
    def y_limits(self) -> tuple[float, float]:
        """Where the y axis begins and ends; there must be points."""
        values = [y for _, y in self.points]
        margin = 0.06 * (max(values) - min(values)) or 0.5
        return self.y_range or (min(values) - margin, max(values) + margin)


@dataclass(frozen=True)
class LoadMap:
    """Load of each expert of one router over training, where 1 is an even share, and its shares of other kinds."""

    name: str
    title: str
    load: Sequence[Sequence[float]]
    """by expert (top to bottom) and step"""
    steps: Sequence[float]
    tips: Sequence[str]
    """about each expert, in words"""
    shares: Chart
    caption: str


def shade(load: float) -> tuple[int, int, int, int]:
    """Red, green, blue, alpha of a load, where 1 is even: transparent when even, full at 4 times more or less."""
    strength = 2.0 if load <= 0 else min(2.0, abs(math.log2(load)))
    return (*((224, 100, 28) if load > 1 else (38, 110, 194)), round(255 * strength / 2))


def short(value: float) -> str:
    """A number at an axis: 2000000 -> `2M`."""
    if value >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:,.6g}"
