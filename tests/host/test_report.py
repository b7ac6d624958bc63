"""Where progress goes besides a terminal: a logger, and one line of a notebook."""

import logging
import sys
import types

from moemamba.host.progress import Report


def test_a_logger_gets_every_line(caplog, capsys):
    report = Report("run", to=logging.getLogger("mine"))
    with caplog.at_level(logging.INFO, "mine"):
        report.note("a line")
        report.warn("careful")
        report.begin("training", 10)
        report.update(1, "one")
        report.end()
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", "run: a line"), ("WARNING", "run: careful")]
    assert capsys.readouterr().out == "" and report.lost() is None


def test_a_notebook_has_one_line_that_changes(monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown[-1] = data["text/plain"]

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    python, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    python.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    inner.display = display
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    report = Report()
    report.note("begins")
    report.begin("training", 10)
    for done in range(1, 5):
        report.update(done, f"step {done}")
    assert len(shown) == 1 and shown[0].startswith("40%  step 4")
    assert capsys.readouterr().out == "begins\n"
