"""Figures as SVG text, drawn to be read on a phone and in a journal. Colours are CSS variables of the page."""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..results.history import Curve
from .escaping import html

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 46, 12, 22, 36
COLOURS = 8  # that report.css has


@dataclass(frozen=True)
class Line:
    """One curve of a chart, with an optional band from `low` to `high` (same steps) around it."""

    name: str
    colour: int
    """number of its style: see `style`"""
    points: Curve
    low: Curve = ()
    high: Curve = ()
    dots: bool = True
    """mark each point, with its value as a tooltip"""


@dataclass(frozen=True)
class Frame:
    """Where data coordinates lie on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        across, up = _share(x, *self.x), _share(y, *self.y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)


def _share(value: float, low: float, high: float) -> float:
    """How far from low to high; what lies far outside is drawn just far enough outside."""
    return max(-1e4, min(1e4, (value - low) / ((high - low) or 1)))


def style(index: int) -> str:
    """CSS classes of a line: one of the page's colours, and when those are used up the same dashed, then dotted."""
    return f"s{index % COLOURS} d{index // COLOURS % 3}"


def line_chart(
    lines: Sequence[Line],
    title: str,
    *,
    y_range: tuple[float, float] | None = None,
    x_label: str = "tokens",
    y_label: str = "",
    y_format: Callable[[float], str] = "{:.4f}".format,
    level: tuple[float, str] | None = None,
    categories: Sequence[tuple[str, str]] = (),
    height: float = 300,
) -> str:
    """Curves over tokens, or whatever `x_label` says.

    Args:
        title: what the chart shows, for those who cannot see it.
        y_range: lowest and highest value shown, the data's own if None; what lies outside is cut off.
        y_format: of a value in a tooltip, which says too where it is: the number on the x axis, or its category.
        level: a dashed horizontal line and its label.
        categories: two lines of text for x = 0, 1, ..., instead of an axis of numbers.
    """
    points = [point for line in lines for curve in (line.points, line.low, line.high) for point in curve]
    if not points:
        return '<p class="note">Nothing was recorded.</p>'
    low, high = y_range or _padded([y for _, y in points])
    x_range = (-0.5, len(categories) - 0.5) if categories else (0, max(x for x, _ in points))
    frame = Frame(x_range, (low, high), height)
    clip = f"clip-{zlib.crc32(html(f'{title}{height}').encode()):x}"
    drawn = [
        _axes(frame, "" if categories else x_label, y_label, categories=categories),
        f'<g clip-path="url(#{clip})">',
    ]
    for line in lines:
        if line.low:
            band = [*line.low, *reversed(line.high)]
            drawn.append(f'<path class="band {style(line.colour)}" d="{_path(frame, band)}Z"/>')
    drawn += [
        f'<path class="line {style(line.colour)}" d="{_path(frame, line.points)}"/>' for line in lines if line.points
    ]
    place = (lambda x: categories[round(x)][0]) if categories else "{:,.0f}".format
    drawn += [_dot(frame, line, x, y, place(x), y_format(y)) for line in lines if line.dots for x, y in line.points]
    if level:
        (x0, y), (x1, _) = frame.place(frame.x[0], level[0]), frame.place(frame.x[1], level[0])
        drawn.append(f'<path class="level" d="M{x0:.1f} {y:.1f}H{x1:.1f}"/>')
        below = y + 18 < height - BOTTOM  # at the bottom it would lie across the axis
        drawn.append(f'<text class="tick" x="{x0 + 5:.1f}" y="{y + (14 if below else -5):.1f}">{html(level[1])}</text>')
    inside = f'<rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT}" height="{height - TOP - BOTTOM + 8}"/>'
    return _svg(height, title, f'<clipPath id="{clip}">{inside}</clipPath>{"".join(drawn)}</g>')


def heat_map(rows: Sequence[Sequence[float]], steps: Sequence[float], title: str, names: Sequence[str]) -> str:
    """Load of each expert (rows, top to bottom) over training (columns), where 1 is an even share.

    Even is the page's own background; more is the warm, less the cool colour, on a logarithmic scale that ends at 4
    and a quarter. Each row has a tooltip from `names`.
    """
    pixels = [[shade(value) for value in row] for row in rows]
    cell = min(18.0, max(6.0, 160 / len(rows)))
    height = cell * len(rows) + TOP + BOTTOM
    frame = Frame((0, steps[-1]), (len(rows), 0), height)
    (x, y), wide, high = frame.place(0, 0), WIDTH - LEFT - RIGHT, cell * len(rows)
    drawn = [
        f'<image x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"/>',
        f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>',
        _axes(frame, "steps", "expert", y_ticks=[0, len(rows) - 1], offset=0.5, grid=False),
    ]
    for index, name in enumerate(names):
        drawn.append(
            f'<rect class="hit" x="{x:.1f}" y="{y + index * cell:.1f}" width="{wide:.1f}" height="{cell:.1f}">'
            f"<title>{html(name)}</title></rect>"
        )
    return _svg(height, title, "".join(drawn))


def shade(load: float) -> tuple[int, int, int, int]:
    """Red, green, blue, alpha of a load, where 1 is even: transparent when even, full at 4 times more or less."""
    strength = 2.0 if load <= 0 else min(2.0, abs(math.log2(load)))
    return (*((224, 100, 28) if load > 1 else (38, 110, 194)), round(255 * strength / 2))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values within a range, steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * power) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _svg(height: float, title: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img"><title>{html(title)}</title>{body}</svg>'


def _axes(
    frame: Frame,
    x_label: str,
    y_label: str,
    *,
    y_ticks: Sequence[float] | None = None,
    offset: float = 0,
    grid: bool = True,
    categories: Sequence[tuple[str, str]] = (),
) -> str:
    """Ticks and labels; `offset` moves the y ticks' places, as for rows whose number stands in their middle."""
    bottom, drawn = frame.height - BOTTOM, []
    values = ticks(*frame.y, most=max(2, int(frame.height / 50))) if y_ticks is None else y_ticks
    for value in values:
        _, y = frame.place(0, value + offset)
        if grid:
            drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    numbers = [(value, (_short(value), "")) for value in ticks(*frame.x, most=5)]
    labels = [(float(k), text) for k, text in enumerate(categories)] or numbers
    for value, lines in labels:
        x, _ = frame.place(value, 0)
        drawn.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        for y, text in zip((bottom + 17, bottom + 31), lines, strict=True):
            drawn.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{html(text)}</text>')
    if grid:
        drawn.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    drawn.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{bottom + 32}" text-anchor="end">{html(x_label)}</text>')
    drawn.append(f'<text class="tick" x="0" y="12">{html(y_label)}</text>')
    return "".join(drawn)


def _dot(frame: Frame, line: Line, x: float, y: float, at: str, value: str) -> str:
    cx, cy = frame.place(x, y)
    tip = html(f"{line.name} at {at}: {value}")
    return (
        f'<g class="dot"><title>{tip}</title><circle class="{style(line.colour)}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.2"/>'
        f'<circle class="hit" cx="{cx:.1f}" cy="{cy:.1f}" r="9"/></g>'
    )


def _path(frame: Frame, points: Curve) -> str:
    return "M" + "L".join("{:.1f} {:.1f}".format(*frame.place(x, y)) for x, y in points)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.06 * (max(values) - min(values)) or 0.5
    return min(values) - margin, max(values) + margin


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:,.6g}"


def _png(pixels: Sequence[Sequence[tuple[int, int, int, int]]]) -> bytes:
    """A picture of RGBA pixels: far smaller than as many SVG rectangles."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in pixels)
    data = zlib.compress(lines, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
