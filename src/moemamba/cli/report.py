"""`moemamba report`: comparisons that were run, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..host.files import expanded, replace
from .options import Place, Positional
from .terminal import line, parse


@dataclass(frozen=True)
class Report:
    """Put comparisons on one page: their tables, figures and settings, from their results.json alone."""

    runs: Positional[tuple[Place, ...]]
    """folders that `moemamba paper` or `moemamba compare` wrote, or their results.json, in the page's order"""
    out: Place = "results.html"
    """the page; .md writes its words and tables as markdown"""
    figures: Place | None = None
    """folder for every figure of the page as PNG and SVG, drawn with matplotlib (the extra plots)"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Report, arguments, "report")
    if not asked.runs:
        raise ValueError("report needs the folder of a comparison, such as runs/paper-main-laptop")
    if not asked.out.endswith((".html", ".md")):
        raise ValueError(f"out is {asked.out!r}; it must end in .html or .md")
    from ..experiments.page import html_page, markdown, require_matplotlib, write_figures
    from ..experiments.results import read_results

    if asked.figures is not None:
        require_matplotlib()
    comparisons = [read_results(expanded(run)) for run in asked.runs]
    page = markdown(comparisons) if asked.out.endswith(".md") else html_page(comparisons)
    replace(expanded(asked.out), page)
    line(f"report: {asked.out}")
    if asked.figures is not None:
        drawn = write_figures(comparisons, expanded(asked.figures))
        line(f"figures: {len(drawn)} files in {asked.figures}")
