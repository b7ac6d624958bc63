"""Charts as SVG text, drawn to be read on a phone and in a journal. Colours are CSS variables of the page."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..results import Curve
from .chart import COLOURS, Chart, Line, LoadMap, shade, short
from .escaping import html

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 46, 12, 22, 36


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
    """CSS classes of a line's colour."""
    return f"s{index % COLOURS} d{index // COLOURS % 3}"


def line_chart(chart: Chart) -> str:
    """A chart; a sentence where it has no points."""
    if not chart.points:
        return '<p class="note">Nothing was recorded.</p>'
    lines, categories, height = chart.lines, chart.categories, chart.height
    frame = Frame(chart.x_limits, chart.y_limits, height)
    clip = f"clip-{zlib.crc32(html(f'{chart.title}{height}').encode()):x}"
    drawn = [
        _axes(frame, "" if categories else chart.x_label, chart.y_label, categories=categories),
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
    drawn += [
        _dot(frame, line, x, y, place(x), chart.y_format(y)) for line in lines if line.dots for x, y in line.points
    ]
    if chart.level:
        value, text = chart.level
        (x0, y), (x1, _) = frame.place(frame.x[0], value), frame.place(frame.x[1], value)
        drawn.append(f'<path class="level" d="M{x0:.1f} {y:.1f}H{x1:.1f}"/>')
        below = y + 18 < height - BOTTOM  # at the bottom it would lie across the axis
        drawn.append(f'<text class="tick" x="{x0 + 5:.1f}" y="{y + (14 if below else -5):.1f}">{html(text)}</text>')
    inside = f'<rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT}" height="{height - TOP - BOTTOM + 8}"/>'
    return _svg(height, chart.title, f'<clipPath id="{clip}">{inside}</clipPath>{"".join(drawn)}</g>')


def heat_map(found: LoadMap) -> str:
    """The load of the experts of a router; each row has a tooltip.

    Even is the page's own background; more is the warm, less the cool colour, on a logarithmic scale that ends at 4
    and a quarter.
    """
    rows = found.load
    pixels = [[shade(value) for value in row] for row in rows]
    cell = min(18.0, max(6.0, 160 / len(rows)))
    height = cell * len(rows) + TOP + BOTTOM
    frame = Frame((0, found.steps[-1]), (len(rows), 0), height)
    (x, y), wide, high = frame.place(0, 0), WIDTH - LEFT - RIGHT, cell * len(rows)
    drawn = [
        f'<image x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"/>',
        f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>',
        _axes(frame, "steps", "expert", y_ticks=[0, len(rows) - 1], offset=0.5, grid=False),
    ]
    for index, tip in enumerate(found.tips):
        drawn.append(
            f'<rect class="hit" x="{x:.1f}" y="{y + index * cell:.1f}" width="{wide:.1f}" height="{cell:.1f}">'
            f"<title>{html(tip)}</title></rect>"
        )
    return _svg(height, found.title, "".join(drawn))


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
    numbers = [(value, (short(value), "")) for value in ticks(*frame.x, most=5)]
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


def _png(pixels: Sequence[Sequence[tuple[int, int, int, int]]]) -> bytes:
    """A picture of RGBA pixels: far smaller than as many SVG rectangles."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in pixels)
    data = zlib.compress(lines, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
