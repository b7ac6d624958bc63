"""`moemamba report`: comparisons that were run, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..host.files import expanded, replace
from .options import Place, Positional
from .terminal import line, parse


@dataclass(frozen=True)
class Asked:
    """Put comparisons on one page: their tables, figures and settings, from their results.json alone."""

    runs: Positional[tuple[Place, ...]]
    """folders that `moemamba paper` or `moemamba compare` wrote, or their results.json, in the page's order"""
    out: Place = "results.html"
    """the page; .md writes its words and tables as markdown"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Asked, arguments, "report")
    if not asked.runs:
        raise ValueError("report needs the folder of a comparison, such as runs/paper-main-laptop")
    if not asked.out.endswith((".html", ".md")):
        raise ValueError(f"out is {asked.out!r}; it must end in .html or .md")
    from ..experiments.page.html import report
    from ..experiments.page.markdown import markdown
    from ..experiments.results.comparison import read_results

    comparisons = [read_results(expanded(run)) for run in asked.runs]
    page = markdown(comparisons) if asked.out.endswith(".md") else report(comparisons)
    replace(expanded(asked.out), page)
    line(f"report: {asked.out}")
