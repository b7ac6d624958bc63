"""Tables in the width that there is, and what they leave out."""

import os
import re
import sys

import comparisons
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemamba.cli import outcome, terminal
from moemamba.experiments.page import HEADER, LEAST


class Terminal:
    """Standard output that is one."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), min_size=1, max_size=4),
    st.permutations("abcde").map(lambda letters: letters[:4]),
)
def test_no_more_is_left_out_than_has_to_be(widths, least):
    """Columns go in the order in which they are missed least, until the rest fits; what stays is whole."""
    rows = [["x" * width for width in row] for row in widths]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(terminal, "_print", lines.append)
        left_out = terminal.show(rows, "abcde", least)
    assert left_out == sorted(least[: len(left_out)])
    kept = [place for place, name in enumerate("abcde") if name not in left_out]
    assert [line.split() for line in lines] == [
        [letter for place in kept if (letter := row[place])] for row in [[*"abcde"], *rows]
    ]

    def total(names):
        return sum(max(1, *(row["abcde".index(name)] for row in widths)) + 2 for name in names) - 2

    assert total("abcde"[place] for place in kept) <= terminal.WIDTH or len(left_out) == len(least)
    if left_out:
        assert total({*"abcde"} - {*least[: len(left_out) - 1]}) > terminal.WIDTH


def longest(shown):
    """Of the lines, but that of the report's paths."""
    return max(len(line) for line in shown.splitlines() if not line.startswith("report: "))


def test_a_comparison_fits(tmp_path, monkeypatch, capsys):
    """120 characters where there is no terminal, and else those of the terminal; the report has all."""
    found = comparisons.comparison()
    outcome.tell(found, tmp_path)
    shown = capsys.readouterr().out
    assert longest(shown) <= terminal.WIDTH
    assert "vs baseline" in shown and "in the report alone: " in shown
    gone = " ".join(shown.split()).partition("in the report alone: ")[2].partition(".")[0].split(", ")
    assert gone and set(gone) <= set(LEAST) and not any(name in shown.partition("Held-out")[0] for name in gone)

    for columns in (70, 90, 400):
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, columns=columns: os.terminal_size((columns, 24)))
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        outcome.tell(found, tmp_path)
        shown = re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.text)  # colours
        assert longest(shown) <= columns
        assert all(name in shown for name in ("model", "held-out loss", "vs baseline"))
        assert ("in the report alone" in shown) == (columns < 400)
    assert all(name in shown for name in HEADER)
