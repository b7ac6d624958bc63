"""`results.json` as a hostile or damaged file: a page or one sentence, and nothing of it is ever markup."""

import copy
import dataclasses
import json
import os
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparisons import MODELS, comparison

from moemamba.experiments.page import html_page, markdown
from moemamba.experiments.page.escaping import html, markdown_text
from moemamba.experiments.page.html import FAILED
from moemamba.experiments.results import (
    RunResult,
    read_history,
    read_results,
    summarise,
)

MARK = "<img src=x onerror=alert(1)>'\"|`MARK`\n# MARK\n\n| MARK | [MARK](javascript:0) \x1b]0;MARK\x07 \ud800"
VALUES = [
    *(None, True, False, 0, -1, 1, 0.5, 2**70, -(2**40), 10**9, 10**400, 1e308, -1e308, 1e-320, float("nan")),
    *(float("inf"), "", "x", "1", MARK, [], {}, [[]], [None], ["x"], [MARK], {"a": 1}, {MARK: MARK}, [1, 2]),
]
PIECES = [b"0", b"[", b"null", b"-", b"e99", b'"', b"{}", b"\xff", b"\x00", b"true", b"\\ud800", b"NaN"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "results.json"
    comparison().write(path)
    return path


@pytest.fixture(scope="module")
def content(file: Path) -> bytes:
    return file.read_bytes()


class Page(HTMLParser):
    """Only tags that our pages have, only attributes of ours."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "img", "link", "a"), tag
        assert not [name for name, value in attrs if name.startswith("on") or "MARK" in str(value)], (tag, attrs)


def pages(path: Path) -> str:
    """The page of a file and its markdown, looked through for the file's text where it would be markup."""
    found = read_results(path)
    page, text = html_page([found]), markdown([found])
    assert FAILED not in page
    assert not re.search(r" d=\"[^\"]*(nan|inf)| [xy12]*=\"(nan|-?inf)", page)
    if "MARK" not in path.read_text(errors="replace"):
        return page
    Page().feed(page)
    for written in (page, text):
        written.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]|<img", written)
    assert not re.search(r"(?<!\\)[`\[]MARK|\n\W*MARK", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = Counter(line.count("|") for line in rows)
    assert all(n > 2 for n in widths.values()), "a cell has ended within its text"
    return page


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(value)
    elif isinstance(value, list):
        children = [0, *range(1, len(value), max(1, len(value) - 2))][: len(value)]  # the first, second and last
    for key in children:
        found += places(value[key], (*at, key))
    return found


def mutant(draw: random.Random, values: Any, everywhere: list[tuple[Any, ...]]) -> bytes:
    """One to three fields replaced, taken away, doubled, renamed or scaled."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *way, last = draw.choice(everywhere)
        try:
            place = values
            for key in way:
                place = place[key]
            kind, old = draw.random(), place[last]
            if kind < 0.15:
                del place[last]
            elif kind < 0.25 and isinstance(place, list):
                place.insert(last, copy.deepcopy(old))
            elif kind < 0.3 and isinstance(place, dict):
                place[draw.choice(["extra", "", MARK])] = place.pop(last)
            elif kind < 0.5 and isinstance(old, int | float):
                place[last] = old * draw.choice([-1, 0, 10, 1e6, 1e-9, 1e15])
            else:
                place[last] = copy.deepcopy(draw.choice(VALUES))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change has taken the place away
    return json.dumps(values).encode()


def mangled(draw: random.Random, content: bytes) -> bytes:
    """Bytes overwritten, cut out, put in, or the rest cut off."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        k = draw.randrange(len(data))
        data[k : k + draw.choice([0, 1, 1, draw.randint(1, 40)])] = draw.choice(
            [b"", bytes([draw.randrange(256)]), *PIECES]
        )
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)


@pytest.mark.parametrize(
    "seeds", [range(400), pytest.param(range(400, 6000), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_any_file_is_a_page_or_one_sentence(seeds: range, content: bytes, tmp_path: Path) -> None:
    values, path = json.loads(content), tmp_path / "results.json"
    everywhere, outcomes = places(values), Counter[str]()
    for seed in seeds:
        draw = random.Random(seed)
        path.write_bytes(mangled(draw, content) if seed % 4 == 0 else mutant(draw, values, everywhere))
        try:
            pages(path)
            outcomes["page"] += 1
        except (ValueError, OSError) as error:
            said = str(error)
            assert not isinstance(error, UnicodeError), (seed, said)
            assert str(path) in said, (seed, said)
            assert said.isprintable(), (seed, said)
            assert len(said) < 500 + len(str(path)), (seed, said)
            outcomes["refused"] += 1
    assert min(outcomes["page"], outcomes["refused"]) > len(seeds) / 8, outcomes


@pytest.mark.parametrize("strings", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_text_in_any_field_is_refused_or_shown_as_text(strings: bool, content: bytes, tmp_path: Path) -> None:
    """Each field in turn, strings and others; and where it is shown, it is there."""
    values, path = json.loads(content), tmp_path / "results.json"
    shown = 0
    for way in places(values):
        changed = copy.deepcopy(values)
        place = changed
        for key in way[:-1]:
            place = place[key]
        if isinstance(place[way[-1]], str) != strings:
            continue
        place[way[-1]] = MARK
        path.write_text(json.dumps(changed))
        try:
            shown += "MARK" in pages(path)
        except ValueError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()
    assert shown >= 6 or not strings  # the title, data, tokenizer, command, what the machine is, a router's name


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("runs", 0, "seed"), "<script>", r"runs\[0\].seed is '<script>'; expected a whole number"),
        (("runs", 0, "seed"), -1, "seed is -1"),
        (("runs", 0, "state"), "done", "expected one of 'finished'"),
        (("runs", 0, "model"), "other", "runs names 'other', which is none of its models"),
        (("runs", 1, "seed"), 0, "mamba with seed 0 twice"),
        (("runs", 0, "evaluation", "loss", 1), float("nan"), r"evaluation.loss\[1\] is nan"),
        (("runs", 0, "evaluation", "loss"), [1.0], "loss has 1 entries; expected 3"),
        (("runs", 0, "evaluation", "step", 1), 10, "step has 10 after 10"),
        (("runs", 0, "training", "loss"), "falling", "training.loss is 'falling'"),
        (("runs", 2, "router", "layers", 0, "load", 1), [1.0], "load has lines of 1 to 4 experts"),
        (("runs", 2, "router", "layers"), [], "3 steps of 0 layers"),
        (("runs", 0, "evaluation"), {}, "state is 'finished', but there is no evaluation"),
        (("models",), [], "baseline is 'mamba'"),
        (("models", 1, "name"), "../up", "cannot name a model's folder"),
        (("models", 1, "config", "n_blocks"), 10**9, "over 10,000 layers"),
        (("models", 1, "config", "d_model"), "wide", "d_model is 'wide'"),
        (("settings", "steps"), 0, "settings.steps is 0; it must be greater than 0"),
        (("settings", "context"), "long", "settings.context is 'long'; expected a whole number"),
        (("paper", "claims", 0, "better"), "other", "paper.claims names 'other'"),
        (("paper", "tunings", "mamba", "losses"), {"fast": 1.0}, "losses names 'fast'; expected a learning rate"),
        (("environment", "torch"), 2, "environment.torch is 2; expected text"),
        (("recipes",), {"other": {}}, "recipes names 'other'"),
        (("format",), [MARK], "its format is"),
    ],
)
def test_what_is_wrong_is_named(way: tuple[Any, ...], value: Any, message: str, content: bytes, tmp_path: Path) -> None:
    values: Any = json.loads(content)
    place = values
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read_results(tmp_path)
    assert str(tmp_path / "results.json") in str(error.value)


def test_files_that_are_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"holds no results.json; name the folder of a comparison"):
        read_results(tmp_path)
    path = tmp_path / "results.json"
    for text in ("[" * 100_000, "[]", "", '{"format": 2}', '{"format": 2, "runs": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.json"):
            read_results(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_results(path)


def test_escaping() -> None:
    assert html("<a href='x'>&\x1b\x00\ud800") == "&lt;a href=&#x27;x&#x27;&gt;&amp;\ufffd\ufffd\ufffd"
    assert markdown_text("a|b <i> `c`\n# d \\") == "a&#124;b &lt;i> \\`c\\` # d \\\\"
    assert markdown_text("−0.0612 (−0.0660 … −0.0555)") == "−0.0612 (−0.0660 … −0.0555)"


def test_a_command_that_is_markup_is_no_code(file: Path) -> None:
    """An indented block would end at its line's end."""
    found = read_results(file)
    assert "    moemamba compare\n" in markdown([found])
    text = markdown([dataclasses.replace(found, command="moemamba compare '<b>\n# no title'")])
    assert "Command: moemamba compare '&lt;b> # no title'" in text


def test_figures_that_a_run_lacks(file: Path) -> None:
    """No bits a byte, no accuracy, no speed: the tables say so with a dash, and the other figures stand."""
    found = read_results(file)
    keys = ("bits_per_byte", "accuracy")
    runs = [
        dataclasses.replace(
            run,
            evaluation=[{k: v for k, v in line.items() if k not in keys} for line in run.evaluation],
            tokens_per_second=float("nan"),
        )
        for run in found.runs
    ]
    less = dataclasses.replace(found, runs=runs, rows=summarise(runs, MODELS, 32))
    less.write(file.with_name("less.json"))
    pages(file.with_name("less.json"))
    assert "not to be judged" in markdown([less])


def test_lines_of_metrics_that_are_no_events(tmp_path: Path) -> None:
    """What is not a line of a run is left out, and what a run could not measure; a run without a last loss diverged."""
    layer = '{"name": "r", "load": [0.5, 0.5], "entropy": 0.1, "dropped": 0, "balance": 1}'
    good = [
        '{"kind": "train", "step": 1, "loss": 3.0, "tokens_per_second": 5}',
        '{"kind": "evaluation", "step": 1, "loss": 3.5}',
        f'{{"kind": "router", "step": 1, "layers": [{layer}]}}',
        '{"kind": "train", "step": 2, "loss": 2.0, "tokens_per_second": 6}',
        '{"kind": "evaluation", "step": 2, "loss": 2.5}',
    ]
    bad = [
        "{}",
        "[]",
        "1",
        "null",
        '"a"',
        '{"step": null}',
        '{"kind": [], "step": 1}',
        '{"kind": "train", "step": "1"}',
    ]
    bad += ['{"kind": "train", "step": 1, "loss": 9}', '{"kind": "evaluation", "step": 1e99, "loss": 9}']
    bad += ['{"kind": "router", "step": 1, "layers": 3}', '{"kind": "router", "step": 0, "layers": [{"load": "x"}]}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(good))
    whole = RunResult.condensed("m", 0, "finished", read_history(tmp_path), 2)
    lines = [line for place, line in enumerate(good) for line in ([line, *bad] if place > 1 else [line])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert RunResult.condensed("m", 0, "finished", read_history(tmp_path), 2) == whole
    assert len(whole.router) == 1
    (tmp_path / "metrics.jsonl").write_text("\n".join([*good, '{"kind": "evaluation", "step": 3, "loss": NaN}']))
    lost = RunResult.condensed("m", 0, "finished", read_history(tmp_path), 2)
    assert (lost.status, [step for step, _ in lost.curve]) == ("diverged", [1, 2])
    assert RunResult.from_dict(json.loads(json.dumps(lost.to_dict()))) == lost


def test_epochs_are_shown_where_the_runs_know_their_corpus(tmp_path: Path) -> None:
    found = comparison()
    assert "epochs" not in markdown([found]) and "train_tokens" not in json.dumps(found.to_dict())
    (tmp_path / "metrics.jsonl").write_text('{"kind": "data", "step": 0, "train_tokens": 960}\n')
    assert read_history(tmp_path).data == [{"kind": "data", "step": 0, "train_tokens": 960}]
    runs = [dataclasses.replace(run, train_tokens=960) for run in found.runs]
    known = dataclasses.replace(found, runs=runs)
    known.write(tmp_path / "results.json")
    again = read_results(tmp_path)
    assert again.runs[0].train_tokens == again.train_tokens == 960
    assert again.epochs(again.rows[0]) == 2.0
    for page in (markdown([again]), html_page([again])):
        assert "epochs" in page
    assert "| mamba | 25.00% | 2.0000 | 0.1 | 2 |" in markdown([again])
