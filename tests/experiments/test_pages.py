"""The pages of a comparison: seen by everybody, made anew from what is kept, never the end of what was computed."""

import contextlib
import io
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from comparisons import MODELS, comparison

from moemamba.cli import run
from moemamba.cli.outcome import tell
from moemamba.experiments.compare import comparing as compare
from moemamba.experiments.page import html as report
from moemamba.experiments.page.chart import Chart, Line
from moemamba.experiments.page.html import FAILED
from moemamba.experiments.page.svg import line_chart
from moemamba.experiments.results import History, RunResult, read_results, summarise

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COMMAND = re.compile(r"`moemamba report\s+docs/results/\{([\w,-]+)\} --out docs/results/results\.html`")


def test_the_published_page_is_made_of_the_published_results(tmp_path: Path) -> None:
    """The command of docs/results.md writes docs/results/results.html, byte for byte."""
    found = COMMAND.search((RESULTS.parent / "results.md").read_text(encoding="utf-8").replace("\n", " "))
    assert found, "docs/results.md has lost its command"
    names = found[1].split(",")
    run(["report", *(str(RESULTS / name) for name in names), "--out", str(tmp_path / "results.html")])
    assert (tmp_path / "results.html").read_bytes() == (RESULTS / "results.html").read_bytes()
    read_results(RESULTS / "rates")


def luminance(colour: str) -> float:
    channels = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_has_contrast(scheme: int) -> None:
    """WCAG AA, 4.5, on both backgrounds."""
    style = files("moemamba.experiments.page").joinpath("page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{[^}]*\}", style)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    assert len(colours) == 13
    for background in ("paper", "panel"):
        for name in ("ink", "soft", *(f"s{k}" for k in range(8))):
            low, high = sorted(luminance(colours[each]) for each in (name, background))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, background)


class Outline(HTMLParser):
    """Levels of headings, and what scrolls without a key."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.stuck: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        if (tag == "pre" or ("class", "wide") in attrs) and ("tabindex", "0") not in attrs:
            self.stuck.append(tag)


@pytest.mark.parametrize("several", [1, 2])
def test_headings_skip_no_level_and_keys_scroll(several: int) -> None:
    outline = Outline()
    page = report.html_page([comparison()] * several)
    outline.feed(page)
    assert outline.levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert not outline.stuck
    assert ("Load of the experts" in page) == (several == 1)
    assert page.count("scrolls sideways") >= 3 * several


def test_a_sweeps_tooltips_name_the_number_of_experts() -> None:
    page = report.html_page([comparison()])
    tips = re.findall(r"<title>(experts, [^<]*)</title>", page)
    assert [tip.split(":")[0] for tip in tips] == [
        *("experts, here at 4", "experts, here at 8", "experts, the paper at 4", "experts, the paper at 8")
    ]
    assert all(re.fullmatch(r"[+−]\d\.\d{4}", tip.split(": ")[1]) for tip in tips)


def test_shares_of_routers_are_over_steps() -> None:
    page = report.html_page([comparison()])
    shares = re.findall(r"<svg[^>]*><title>Shares of .*?</svg>", page)
    assert shares
    assert all(">steps<" in drawing and ">tokens<" not in drawing for drawing in shares)


@pytest.mark.parametrize("level", [0.0, 0.02, 0.5, 1.0])
def test_a_levels_label_keeps_off_the_axis(level: float) -> None:
    drawing = line_chart(Chart("t", "t", [Line("a", 0, [(0, 0.0), (1, 1.0)])], y_range=(0, 1), level=(level, "final")))
    (y,) = re.findall(r'y="([\d.]+)">final', drawing)
    assert float(y) < 300 - 36 - 3


# A comparison that has been computed is not lost


def fails(*_: object) -> list[str]:
    raise ZeroDivisionError("no such thing")


def test_a_figure_that_fails_leaves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "curves", fails)
    page = report.html_page([comparison()])
    assert f"{FAILED}: ZeroDivisionError no such thing" in page
    assert "Loss by number of experts" in page


def test_a_page_that_fails_leaves_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = comparison()
    (tmp_path / "report.html").write_text("before")
    monkeypatch.setattr(compare, "html_page", fails)
    found.write(tmp_path / "results.json")
    compare._write_pages(found, tmp_path)
    assert "report.html is not written (no such thing); `moemamba report" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "before"
    assert (tmp_path / "results.md").exists()
    assert read_results(tmp_path).rows == found.rows


@pytest.mark.parametrize("kind", ["ascii", "cp1252", "closed", "none", "full"])
def test_a_terminal_that_cannot_show_the_table(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.BytesIO()
    output: object = io.TextIOWrapper(shown, encoding=kind if kind in ("ascii", "cp1252") else "utf-8")
    if kind == "closed":
        output.close()  # type: ignore[attr-defined]
    elif kind == "none":
        output = None
    elif kind == "full":
        output = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        tell(comparison(), tmp_path)
    if kind == "full":
        with contextlib.suppress(OSError):
            output.close()  # type: ignore[attr-defined]
    told = f"the table could not be shown here ({{}}); it is in {tmp_path / 'results.md'}".split("{}")
    said = capsys.readouterr().err
    if not shown.closed and b"report: " in shown.getvalue():
        return  # all of it, what the encoding lacks replaced
    assert kind in ("none", "full") or all(part in said for part in told)


def test_the_report_is_written_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison().write(tmp_path / "results.json")
    page = tmp_path / "page.html"
    page.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*page.html: No space left on device; free space"):
        run(["report", str(tmp_path), "--out", str(page)])
    assert page.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "results.json"]


def test_a_baseline_counts_with_the_lower_of_its_weights_and_their_average():
    def run(model, seed, loss, averaged):
        train = [{"step": 10, "loss": loss, "tokens_per_second": 1.0}]
        line = {"step": 10, "tokens": 64, "seconds": 1.0, "bits_per_byte": 2.0, "accuracy": 0.25}
        history = History(train, [line | {"loss": loss, "averaged": averaged}], [])
        return RunResult.condensed(model, seed, "finished", history, 15)

    runs = [run("mamba", 0, 3.0, 2.9), run("mamba", 1, 3.0, 3.2), run("experts-4", 0, 2.8, 2.7)]
    runs.append(run("experts-4", 1, 2.8, 2.85))
    first, second = summarise(runs, {name: MODELS[name] for name in ("mamba", "experts-4")}, 32)
    assert first.averaged_difference.values == (0.0, 0.2)
    assert second.averaged_difference.values == pytest.approx((-0.2, -0.15))
