"""The page's figures as files, for papers and slides: PNG and SVG, drawn with matplotlib (the extra `plots`)."""

import io
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...host.files import replace
from ..results import Comparison
from .chart import COLOURS, Chart, Line, LoadMap, shade, short
from .escaping import printable
from .figures import curves, routing, sweeps
from .maps import maps
from .section import section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (6.4, 4.0)  # inches
DPI = 200
STYLES = ("-", "--", ":")
SETTINGS = {  # names are text, never formulas; the same figure is the same file
    "text.parse_math": False,
    "svg.hashsalt": "moemamba",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_matplotlib() -> Any:
    """matplotlib; raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            f"matplotlib cannot be used ({error}); pip install 'moemamba[plots]', or leave --figures out"
        ) from error
    return matplotlib


def write_figures(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write every figure that the page of these comparisons has, each as NAME.png and NAME.svg; their paths.

    Of several comparisons each has a folder of its own, numbered as on the page.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: a file cannot be written; those before it are complete.
    """
    matplotlib = require_matplotlib()
    written: list[Path] = []
    with matplotlib.rc_context(SETTINGS):
        for number, found in enumerate(comparisons, start=1):
            alone = len(comparisons) == 1
            place = folder if alone else folder / f"{number}-{_slug(section(found).title)[:40].strip('-')}"
            place.mkdir(parents=True, exist_ok=True)
            for name, figure in _figures(found, with_maps=alone):
                while place / f"{name}.png" in written:  # models may be called `a` and `A`
                    name += "-again"
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    content = io.BytesIO()
                    figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
                    written.append(place / f"{name}.{kind}")
                    replace(written[-1], content.getvalue())
    return written


def _figures(found: Comparison, with_maps: bool) -> Iterator[tuple[str, "Figure"]]:
    """Names and drawings, in the page's order."""
    for chart in (*curves(found), *sweeps(found), *routing(found)):
        if chart.points:
            yield _slug(chart.name), _drawn(chart)
    for run, layers in maps(found) if with_maps else ():
        for layer in layers:
            yield _slug(f"load {run.model} seed {run.seed} {layer.name}"), _mapped(layer)


def _slug(text: str) -> str:
    """A file's name of a text: `Held-out loss` -> `held-out-loss`."""
    return re.sub(r"[^\w.]+", "-", text.lower(), flags=re.ASCII).strip("-.")[:100] or "figure"


def _drawn(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, chart)
    axes.set_title(_text(chart.title), loc="left")
    return figure


def _mapped(found: LoadMap) -> "Figure":
    """The load of a router's experts above its shares of other kinds."""
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    pixels = [[shade(load) for load in row] for row in found.load]
    end, experts = found.steps[-1], len(pixels)
    above.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, end or 1, experts - 0.5, -0.5))
    above.set_ylabel("expert")
    above.set_yticks(sorted({0, experts - 1}))
    above.set_title(_text(found.title), loc="left")
    _draw(below, found.shares)
    return figure


def _draw(axes: "Axes", chart: Chart) -> None:
    """A chart's lines, bands, level and labels."""
    colours = _colours()
    handles = [_line(axes, line, colours[line.colour % COLOURS]) for line in chart.lines if line.points]
    names = [_text(line.name) for line in chart.lines if line.points]
    if chart.level:
        value, text = chart.level
        handles.append(axes.axhline(value, color="0.4", linestyle="--", linewidth=0.8))
        names.append(_text(text))
    shown = [(handle, name) for handle, name in zip(handles, names, strict=True) if name]
    if shown:
        axes.legend(*zip(*shown, strict=True), frameon=False, fontsize="small")
    axes.set_xlim(chart.x_limits if any(chart.x_limits) else (0, 1))
    axes.set_ylim(chart.y_limits)
    axes.set_ylabel(_text(chart.y_label))
    if chart.categories:
        axes.set_xticks(range(len(chart.categories)), [_text("\n".join(lines)) for lines in chart.categories])
    else:
        axes.set_xlabel(_text(chart.x_label))
        axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _line(axes: "Axes", line: Line, colour: str) -> Any:
    if line.low:
        band = [x for x, _ in line.low]
        axes.fill_between(band, [y for _, y in line.low], [y for _, y in line.high], color=colour, alpha=0.15, lw=0)
    marker = "o" if line.dots else None
    steps, values = zip(*line.points, strict=True)
    return axes.plot(steps, values, STYLES[line.dashes], color=colour, marker=marker, markersize=2.5, linewidth=1.4)[0]


def _text(text: str) -> str:
    """Text for a drawing; a name that begins with _ would be left out of a legend."""
    return "\n".join(f" {line}" if line.startswith("_") else line for line in map(printable, text.split("\n")))


def _colours() -> list[str]:
    """The page's, in its light scheme."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return re.findall(r"--s\d: (#[0-9a-f]{6});", style)[:COLOURS]
