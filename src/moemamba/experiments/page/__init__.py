"""Comparisons as pages: words and drawings."""

from .html import html_page
from .markdown import markdown
from .plots import require_matplotlib, write_figures
from .section import STEPS_NOTES, loss_notes
from .tokens import routing_page
from .wording import HEADER, Measure, cells, count, says, signed, times, verdict

__all__ = [
    "HEADER",
    "STEPS_NOTES",
    "Measure",
    "cells",
    "count",
    "html_page",
    "loss_notes",
    "markdown",
    "require_matplotlib",
    "routing_page",
    "says",
    "signed",
    "times",
    "verdict",
    "write_figures",
]
