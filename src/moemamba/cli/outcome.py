"""What `compare` and `paper` print when all is trained. Everything lies on the disk by then: printing may fail."""

import contextlib
import sys
from pathlib import Path

from ..experiments.page import HEADER, STEPS_NOTES, Grid, Measure, cells, loss_notes, reported_tests, says, verdict
from ..experiments.results import Comparison
from .terminal import show


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
    show(cells(found.rows), HEADER)
    print(f"\n{loss_notes(found.seeds)} {STEPS_NOTES}\n")
    for block in reported_tests(found):
        if isinstance(block, Grid):
            show(block.rows, block.header)
            print()
        else:
            print(f"{block}\n")
    if found.paper:
        measure: Measure = "test" if all(row.test.values for row in found.rows) else "loss"
        where = "on the test text" if measure == "test" else "here"
        show([(says(claim), verdict(claim, found.rows, measure)) for claim in found.paper.claims], ("claim", where))
        print()
    print(f"report: {out / 'results.md'}, {out / 'report.html'}", flush=True)


def _aside(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
