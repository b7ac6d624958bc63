"""`report --figures`: every figure of the page as PNG and SVG, drawn from the curves that the page is drawn from."""

import dataclasses
import re
import sys
from html import unescape
from pathlib import Path

import pytest
from comparisons import comparison

from moemamba.cli import run
from moemamba.experiments.page import html_page, plots, write_figures
from moemamba.experiments.page.chart import Chart, Line
from moemamba.experiments.page.figures import curves, routing, sweeps
from moemamba.experiments.page.maps import maps
from moemamba.experiments.page.svg import line_chart
from moemamba.experiments.results import summarise


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison().write(tmp_path / "results.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["report", str(tmp_path), "--out", str(tmp_path / "page.html"), "--figures", str(tmp_path / "figures")]
    with pytest.raises(ValueError, match=r"matplotlib cannot be used .*pip install 'moemamba\[plots\]', or leave"):
        run(command)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    run(command[:-2])
    assert (tmp_path / "page.html").exists()


def test_every_figure_of_the_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    comparison().write(tmp_path / "results.json")
    out, folder = tmp_path / "page.html", tmp_path / "new" / "figures"
    run(["report", str(tmp_path), "--out", str(out), "--figures", str(folder)])
    names = {
        re.sub(r"[^a-z.]+", "-", unescape(name).lower())
        for name in re.findall(r"class='name'>(.*?)</p><", out.read_text())
    }
    names -= {"shared-settings", "machine", "models", "layers.-"}
    loads = {f"load-{run.model}-seed-{run.seed}-{layer.name}" for run, own in maps(comparison()) for layer in own}
    assert {path.stem for path in folder.iterdir()} == names | loads
    assert {"held-out-loss", "speed-up", "loss-by-number-of-experts", "busiest-expert"} <= names
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml"), path
    written = len(list(folder.iterdir()))
    assert written == 2 * len(names | loads)
    assert f"figures: {written} files in {folder}" in capsys.readouterr().out


def test_both_drawings_have_the_same_curves() -> None:
    pytest.importorskip("matplotlib")
    found = comparison()
    page = html_page([found])
    for chart in (*curves(found), *sweeps(found), *routing(found)):
        assert line_chart(chart) in page
        (axes,) = plots._drawn(chart).axes
        drawn = [[tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines]
        assert drawn[: len(chart.lines)] == [[tuple(map(float, p)) for p in line.points] for line in chart.lines]
        assert axes.get_ylim() == pytest.approx(chart.y_limits)
        colours = [line.get_color() for line in axes.lines]
        assert len(set(colours[: len(chart.lines)])) == len({line.colour % 8 for line in chart.lines})


def test_several_comparisons_have_folders(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write_figures([comparison(), comparison()], tmp_path)
    assert {path.parent.name for path in paths} == {"1-table", "2-table"}
    assert not [path for path in paths if path.name.startswith("load")]  # nor has the page maps then
    first, second = ((tmp_path / name / "speed-up.svg").read_bytes() for name in ("1-table", "2-table"))
    assert first == second


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    """No formula, no control, no line left out of the legend, no path out of the folder."""
    pytest.importorskip("matplotlib")
    names = ("_mamba", "experts+4", "experts-4")
    found = comparison()
    old = [row.name for row in found.rows]
    runs = [dataclasses.replace(r, model=names[old.index(r.model)]) for r in found.runs]
    rows = summarise(runs, {new: row.config for new, row in zip(names, found.rows, strict=True)}, 32)
    paths = write_figures([dataclasses.replace(found, rows=rows, runs=runs, recipes={}, paper=None)], tmp_path)
    assert {path.parent for path in paths} == {tmp_path}
    assert len(set(paths)) == len(paths) and any("again" in path.name for path in paths)
    figure = plots._drawn(Chart("a", "$\\frac{ \x1b", [Line("_a$^", 0, [(0, 1.0), (1, 2.0)])], y_label="$_\x00"))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [" _a$^"]


def test_a_single_point_is_a_figure() -> None:
    pytest.importorskip("matplotlib")
    figure = plots._drawn(Chart("a", "a", [Line("a", 0, [(0, 1.0)])]))
    assert figure.axes[0].get_xlim() == (0, 1)
