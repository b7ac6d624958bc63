"""Comparisons as pages: words and drawings."""

from .html import html_page
from .markdown import markdown
from .plots import require_matplotlib, write_figures
from .section import STEPS_NOTES, Grid, loss_notes, reported_tests
from .tokens import routing_page
from .wording import HEADER, LEAST, Measure, cells, count, says, signed, times, verdict

__all__ = [
    "HEADER",
    "LEAST",
    "STEPS_NOTES",
    "Grid",
    "Measure",
    "cells",
    "count",
    "html_page",
    "loss_notes",
    "markdown",
    "reported_tests",
    "require_matplotlib",
    "routing_page",
    "says",
    "signed",
    "times",
    "verdict",
    "write_figures",
]
