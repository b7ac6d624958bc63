"""What `compare` and `paper` print when all is trained. Everything lies on the disk by then: printing may fail."""

import contextlib
import sys
import textwrap
from pathlib import Path

from ..experiments.page import (
    HEADER,
    LEAST,
    STEPS_NOTES,
    Grid,
    Measure,
    cells,
    loss_notes,
    reported_tests,
    says,
    verdict,
)
from ..experiments.results import Comparison
from .terminal import show, width


def tell(found: Comparison, out: Path) -> None:
    """Print a comparison's table, its claims if it has any, and where its pages lie.

    What the terminal cannot show (a character that its encoding lacks, an output that is closed) is no error: one line
    on standard error says so. Raises BrokenPipeError where the reader has left, as all commands do.
    """
    try:
        _print(found, out)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: there is no standard output at all
        _aside(f"moemamba: the table could not be shown here ({error}); it is in {out / 'results.md'}")


def _print(found: Comparison, out: Path) -> None:
    print()
    left_out = show(cells(found.rows), HEADER, LEAST)
    print()
    _note(f"{loss_notes(found.seeds)} {STEPS_NOTES}")
    for block in reported_tests(found):
        if isinstance(block, Grid):
            left_out += show(block.rows, block.header, reversed(block.header[4:]))
            print()
        else:
            _note(block)
    if found.paper:
        measure: Measure = "test" if all(row.test.values for row in found.rows) else "loss"
        where = "on the test text" if measure == "test" else "here"
        show([(says(claim), verdict(claim, found.rows, measure)) for claim in found.paper.claims], ("claim", where))
        print()
    if left_out:
        _note(f"For want of room here, in the report alone: {', '.join(dict.fromkeys(left_out))}.")
    print(f"report: {out / 'results.md'}, {out / 'report.html'}", flush=True)


def _note(text: str) -> None:
    """A paragraph, and an empty line."""
    print(textwrap.fill(text, width(), break_on_hyphens=False, break_long_words=False), end="\n\n")


def _aside(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
