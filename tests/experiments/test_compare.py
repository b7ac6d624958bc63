"""Comparisons: their arithmetic on curves made by hand, their fairness and resumption on tiny real runs."""

import dataclasses
import json
import math
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import comparisons
import pytest
import torch

from moemamba import TrainConfig, load, ops, preset, train
from moemamba.cli.outcome import tell
from moemamba.config import ExpertsConfig, ModelConfig
from moemamba.counting import count_parameters
from moemamba.experiments.compare import Contender, compare, parse_contender, parse_contenders
from moemamba.experiments.page import cells, count, html_page, markdown, signed, times, verdict
from moemamba.experiments.page.chart import shade
from moemamba.experiments.page.section import Grid, section
from moemamba.experiments.page.svg import ticks
from moemamba.experiments.results import (
    Claim,
    Comparison,
    History,
    RunResult,
    Spread,
    Test,
    crossing,
    error_of_difference,
    read_history,
    read_results,
    smoothed,
    smoothing,
    speed_up,
    summarise,
    thinned,
)
from moemamba.host.progress import Report
from moemamba.reading import to_dict

MAMBA = ModelConfig("M", 1, 16)
MOE = ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, d_expert=16, capacity_factor=1.0))


# Curves


def test_crossing_is_interpolated():
    curve = [(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert crossing(curve, 2.25) == 17.5
    assert crossing(curve, 2.0) == 20
    assert crossing(curve, 1.75) == pytest.approx(32.5)  # from the lowest so far, 2.0, not from 2.5
    levels = [3 - k / 50 for k in range(101)]
    steps = [crossing(curve, level) for level in levels]
    assert steps == sorted(steps)
    assert crossing(curve, 5.0) == 10
    assert crossing(curve, 0.5) is None
    assert crossing([], 1.0) is None


def test_smoothing_starts_unbiased():
    assert [value for _, value in smoothed([(1, 4.0), (2, 4.0), (3, 4.0)], 0.1)] == pytest.approx([4.0, 4.0, 4.0])
    assert [value for _, value in smoothed([(1, 4.0), (2, 2.0)], 0.5)] == pytest.approx([4.0, 8 / 3])
    assert smoothed([(1, 4.0), (2, 2.0)], 1) == [(1, 4.0), (2, 2.0)]


def test_smoothing_does_not_depend_on_how_often_a_run_writes():
    """A line that stands for ten steps counts as ten lines of its value."""
    every = [(step, float((step - 1) // 10)) for step in range(1, 101)]
    seldom = [(step, float((step - 1) // 10)) for step in range(10, 101, 10)]
    assert [v for s, v in smoothed(every, 0.01) if s % 10 == 0] == pytest.approx([v for _, v in smoothed(seldom, 0.01)])
    assert (smoothing(150_000), smoothing(15_000), smoothing(3000), smoothing(10)) == (0.001, 0.001, 0.005, 1.0)


def test_thinning_keeps_the_last():
    curve = [(step, 0.0) for step in range(1, 1002)]
    assert len(thinned(curve, 200)) <= 200
    assert thinned(curve, 200)[-1] == (1001, 0.0)
    assert thinned(curve[:200], 200) == curve[:200]
    assert thinned([], 200) == []


def test_speed_up_of_a_curve_twice_as_fast():
    slow = [(step, 10 - step / 10) for step in range(10, 81, 10)]
    fast = [(step, 10 - step / 5) for step in range(10, 81, 10)]
    assert speed_up(slow, fast)[0][0] == 20  # before fast was first measured nothing is known
    assert [ratio for _, ratio in speed_up(slow, fast)] == pytest.approx([2.0] * 7)
    assert [step for step, _ in speed_up(fast, slow)] == [10, 20, 30, 40]  # what slow has reached in its 80 steps
    assert {ratio for _, ratio in speed_up(slow, slow)} == {1.0}


def test_history_of_a_run_that_still_writes(tmp_path):
    lines = [
        '{"kind": "train", "step": 1, "loss": 2.0}',
        '{"kind": "evaluation", "step": 1, "loss": 2.5}',
        '{"kind": "tr',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path)
    assert history.curve("train", "loss") == [(1, 2.0)]
    assert history.curve("evaluation", "loss") == [(1, 2.5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[2], *lines[:2]]))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1, is not JSON"):
        read_history(tmp_path)


# Figures


def fake_run(model: str, seed: int, *losses: float) -> RunResult:
    train = [{"step": 10 * (k + 1), "loss": loss, "tokens_per_second": 100.0 + seed} for k, loss in enumerate(losses)]
    evaluation = [
        {"step": 10 * (k + 1), "loss": loss, "bits_per_byte": loss / math.log(2), "accuracy": 1 / (1 + loss)}
        for k, loss in enumerate(losses)
    ]
    return RunResult.condensed(model, seed, "finished", History(train, evaluation, []), 15)  # so short: not smoothed


def test_differences_are_paired_by_seed():
    runs = [
        fake_run("base", 0, 4.0, 3.0, 2.0),
        fake_run("base", 1, 4.0, 3.1, 2.2),
        fake_run("better", 1, 3.0, 2.2, 2.0),
        fake_run("better", 0, 3.0, 2.0, 1.9),
    ]
    base, better = summarise(runs, {"base": MAMBA, "better": MOE}, context=32)
    assert better.difference.values == pytest.approx((-0.1, -0.2))
    assert better.loss.mean == pytest.approx(1.95)
    assert better.loss.std == pytest.approx(math.sqrt(0.005))
    assert better.steps_to_baseline == (20, 20)
    assert better.speed_up and better.speed_up.mean == pytest.approx(1.5)
    assert better.verdict == "lower with each of 2 seeds"
    assert base.difference.values == (0, 0)
    assert base.verdict == "no clear difference"
    header_to_cell = cells([base, better])[1]
    assert header_to_cell[4] == "−0.1500 (−0.2000 … −0.1000)"
    assert header_to_cell[5:9] == ("20", "1.50× (1.50 … 1.50)", "1.9500", "1.50× (1.50 … 1.50)")


def test_what_dropping_would_add_stands_beside_the_loss():
    base, limited = fake_run("base", 0, 4.0, 2.0), fake_run("limited", 0, 3.0, 1.9)
    for line in limited.evaluation:
        line["drop_gap"] = 0.01 * line["step"] / 20
    settings = {"steps": 20, "batch_size": 1, "context": 32, "learning_rate": 0.1, "data": "text", "tokenizer": "bytes"}
    for runs, cells_of_gaps in (([base, limited], ["–", "+0.0100"]), ([base], None)):
        models = {run.model: MOE for run in runs}
        found = Comparison(summarise(runs, models, 32), runs, settings, {}, {}, None)
        table = next(block for block in section(found).parts[0][1] if isinstance(block, Grid))
        assert ("drop gap" in table.header) == (cells_of_gaps is not None) == ("drop gap" in markdown([found]))
        if cells_of_gaps:
            assert [row[table.header.index("drop gap")] for row in table.rows] == cells_of_gaps


def test_a_model_that_never_gets_there():
    runs = [fake_run("base", 0, 4.0, 2.0), fake_run("worse", 0, 4.0, 3.0)]
    _, worse = summarise(runs, {"base": MAMBA, "worse": MOE}, context=32)
    assert worse.steps_to_baseline == (None,)
    assert worse.speed_up is None
    assert cells([worse])[0][5:7] == ("> 20", "–")
    assert worse.verdict == "higher, one seed"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.01, 0.012), "no clear difference"),
        ((-0.001, -0.2), "no clear difference"),
        ((-0.1, -0.12, -0.11), "lower with each of 3 seeds"),
        ((0.1, 0.12), "higher with each of 2 seeds"),
    ],
)
def test_verdict_needs_one_sign_and_more_than_the_spread(differences, verdict):
    runs = [fake_run("base", seed, 2.0) for seed in range(len(differences))]
    runs += [fake_run("other", seed, 2.0 + d) for seed, d in enumerate(differences)]
    assert summarise(runs, {"base": MAMBA, "other": MOE}, context=32)[1].verdict == verdict


def test_numbers_for_people():
    assert [count(n) for n in (950, 27_131_904, 2_439_069_696)] == ["950", "27.1M", "2.44B"]
    assert signed(Spread((0.5,))) == "+0.5000"
    assert times(Spread((1.25, 1.75))) == "1.50× (1.25 … 1.75)"
    assert times(Spread((1.25,))) == "1.25×"
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.33, 1.67) == pytest.approx([1.4, 1.5, 1.6])
    assert ticks(2, 2) == [2]
    assert shade(1.0)[3] == 0
    assert shade(4.0)[3] == shade(0.25)[3] == shade(0.0)[3] == 255
    assert shade(2.0)[:3] != shade(0.5)[:3]


# Naming models


def test_contenders():
    assert parse_contender("mamba-tiny") == Contender("mamba-tiny", preset("mamba-tiny"), {})
    many = parse_contender("many=moe-mamba-tiny,n_experts=32,learning_rate=0.002,experts.activation=relu")
    assert many.name == "many"
    assert many.model == preset("moe-mamba-tiny", experts=ExpertsConfig(32, activation="relu"))
    assert many.recipe == {"learning_rate": 0.002}
    inner = parse_contender('mamba-tiny,pattern=MR,routed.projections=["conv","out"],optimizer=muon,clip=0.5')
    assert inner.model.routed.projections == ("conv", "out")
    assert inner.model.pattern == "MR"
    assert inner.recipe == {"optimizer": "muon", "clip": 0.5}


def test_contender_from_a_file(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(to_dict(MOE)))
    assert parse_contender(f"{tmp_path}/own.json") == Contender("own", MOE, {})
    assert parse_contender(f"x={tmp_path}/own.json").name == "x"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["mamba-tiny"], "two models or more"),
        (["mamba-tiny", "mamba-tiny"], "two models are called 'mamba-tiny'"),
        (["a=mamba-tiny", "b=mamba-tinny"], "no preset 'mamba-tinny'"),
        (["a=mamba-tiny", "b=mamba-tiny,d_stat=3"], "d_stat is no field of the configuration"),
        (["a=mamba-tiny", "b=mamba-tiny,mamba.d_stat=3"], r"model.mamba has the unknown key 'd_stat'"),
        (["a=mamba-tiny", "b=mamba-tiny,mambo.d_state=3"], "model has the unknown key 'mambo'"),
        (["a=mamba-tiny", "b=mamba-tiny,d_state"], "write FIELD=VALUE"),
        (["a=mamba-tiny", "b=mamba-tiny,batch_size=3"], "the same for all models"),
        (["a=mamba-tiny", "../b=mamba-tiny"], "cannot name a model's folder"),
    ],
)
def test_contenders_that_cannot_be(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_contenders(texts)


# Real runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with enough to learn that training shows."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(3000)))
    return str(path)


@pytest.fixture(scope="module")
def base(text):
    return TrainConfig(
        data=text, steps=12, batch_size=2, context=32, log_every=2, eval_every=4, eval_tokens=512, learning_rate=1e-2
    )


@pytest.fixture(autouse=True, scope="module")
def small_work():
    """Tensors are tiny: threads would only wait for each other, kernels for their compilation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.backend("reference"):
        yield
    torch.set_num_threads(threads)


CONTENDERS = [
    Contender("mamba", MAMBA, {}),
    Contender("twin", MAMBA, {}),
    Contender("moe", MOE, {}),
    Contender("hardly", MAMBA, {"learning_rate": 1e-6}),
]


@pytest.fixture(scope="module")
def compared(base, small_work, tmp_path_factory):
    """(comparison, its directory)"""
    out = tmp_path_factory.mktemp("compare")
    return compare(CONTENDERS, base, 2, out, command="moemamba compare <these>", silent=True), out


def test_identical_models_do_not_differ(compared):
    """The check that the comparison itself is fair: same weights, same batches, same evaluation under another name."""
    _, twin, _, hardly = compared[0].rows
    assert twin.difference.values == (0, 0)
    assert twin.verdict == "no clear difference"
    assert twin.speed_up and twin.speed_up.values == (1, 1)
    assert hardly.verdict == "higher with each of 2 seeds"


def test_seeds_change_weights_and_data(compared):
    runs = {(run.model, run.seed): run for run in compared[0].runs}
    assert runs["mamba", 0].curve != runs["mamba", 1].curve
    configs = [json.loads((compared[1] / "moe" / f"seed-{seed}" / "train.json").read_text()) for seed in (0, 1)]
    assert [(config["seed"], config["data_seed"]) for config in configs] == [(0, 0), (1, 1)]


def test_runs_write_down_the_size_of_their_corpus(compared, base):
    found, _ = compared
    assert {run.train_tokens for run in found.runs} == {found.train_tokens}
    tokens = base.steps * base.batch_size * base.context
    assert found.train_tokens and found.epochs(found.rows[0]) == tokens / found.train_tokens
    assert f"{tokens / found.train_tokens:.3g}" in str(section(found).parts)


def test_results_hold_all_figures(compared):
    comparison, out = compared
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(comparison.to_dict()))
    assert results["baseline"] == "mamba"
    assert [model["name"] for model in results["models"]] == ["mamba", "twin", "moe", "hardly"]
    assert results["models"][2]["parameters"]["active"] < results["models"][2]["parameters"]["total"]
    assert results["models"][2]["config"]["vocab_size"] == 257
    assert len(results["runs"]) == 8
    assert results["runs"][0]["evaluation"]["step"] == [4, 8, 12]
    assert results["settings"]["learning_rate"] == 0.01
    assert results["recipes"]["hardly"] == {"learning_rate": 1e-6}


def test_pages_come_from_results_alone(compared):
    """The same page and tables, from figures of the file that are those of the runs."""
    comparison, out = compared
    again = read_results(out / "results.json")
    assert again == comparison
    assert html_page([again]) == (out / "report.html").read_text()
    assert markdown([again]) == (out / "results.md").read_text()
    history = read_history(out / "moe" / "seed-1")
    run = next(run for run in again.runs if (run.model, run.seed) == ("moe", 1))
    assert [loss for _, loss in run.curve] == pytest.approx([line["loss"] for line in history.evaluation], abs=1e-6)
    assert run.evaluation[-1]["drop_gap"] == pytest.approx(history.evaluation[-1]["drop_gap"], abs=1e-6)
    assert [line["step"] for line in run.router] == [line["step"] for line in history.router]
    shares = [4 * share for share in history.router[-1]["layers"][0]["load"]]
    assert run.router[-1]["layers"][0]["load"] == pytest.approx(shares, abs=0.006)
    with pytest.raises(ValueError, match=r"config.json is not a comparison's results.json"):
        read_results(out / "moe" / "seed-1" / "config.json")


def test_results_stay_small():
    """However often a run writes and however many experts it has: thirty runs in two megabytes."""
    lines = [{"step": step, "loss": 4 + 1 / step, "tokens_per_second": 1e6 + step} for step in range(1, 2001)]
    evaluation = [
        {"step": k * 50, "tokens": k * 123_456_789, "seconds": k * 1.2345, "drop_gap": 0.0123456}
        | {"loss": 4.123456 + k, "bits_per_byte": 1.123456, "accuracy": 0.345678}
        for k in range(1, 41)
    ]
    layer = {
        "load": [1 / 128 + k / 1e5 for k in range(128)],
        "entropy": 4.81234,
        "dropped": 0.01234,
        "balance": 1.01234,
    }
    router = [{"step": k, "layers": [{"name": f"layers.{n}", **layer} for n in range(24)]} for k in range(1, 2001)]
    run = RunResult.condensed("model", 0, "finished", History(lines, evaluation, router), 2000)
    assert len(json.dumps(run.to_dict(), separators=(",", ":"))) < 65_000
    assert RunResult.from_dict(json.loads(json.dumps(run.to_dict()))) == run


class Outline(HTMLParser):
    """Tags of a page, and whether each that opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        assert tag not in ("script", "link", "iframe")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_stands_alone(compared):
    page = (compared[1] / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert not outline.links
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    titles = [drawing[0].text for drawing in drawings]
    assert titles[:4] == [
        "Held-out loss over tokens",
        "Speed-up over tokens",
        "Training loss over tokens",
        "Held-out loss over seconds of training",
    ]
    assert titles.count("Load of the experts of layers.1.branches.0") == 2  # one a seed
    assert "moemamba compare &lt;these&gt;" in page
    assert "no clear difference" in page
    assert page.count("the capacity limits of training would add") == 3  # below the table, and one a seed


def test_a_model_with_a_schedule_of_its_own(base, compared, tmp_path):
    """Its learning rate falls within its own steps, on the batches that the others begin with."""
    short = Contender("short", MAMBA, {"steps": 6})
    found = compare([Contender("mamba", MAMBA, {}), short], base, 1, tmp_path, silent=True)
    mamba, short = found.rows
    assert (mamba.steps, short.steps) == (12, 6)
    history = read_history(tmp_path / "short" / "seed-0")
    assert [line["step"] for line in history.evaluation] == [4, 6]
    assert history.train[-1]["learning_rate"] < read_history(tmp_path / "mamba" / "seed-0").train[2]["learning_rate"]
    assert [line["step"] for line in history.train] == [2, 4, 6]
    assert history.train[0]["loss"] == read_history(tmp_path / "mamba" / "seed-0").train[0]["loss"]
    assert cells(found.rows)[1][5] in ("> 6", f"{short.steps_to_baseline[0] or 0:,.0f}")
    assert "But short ran for 6 steps, 384 tokens, with a schedule of that length." in markdown([found])
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "results.json", tmp_path / "alone")
    assert markdown([read_results(tmp_path / "alone")]) == markdown([found])


def test_a_comparison_goes_on_where_it_stopped(base, compared, tmp_path):
    """Half a run, a finished run and runs that never began come to the same figures as without a stop."""
    whole = compared[0]
    for run, stop in ((whole.runs[0], None), (whole.runs[1], 6)):
        config = TrainConfig(**{**vars(base), "model": MAMBA, "run": str(tmp_path / run.model / "seed-0")})
        train(config, stop=stop)
    finished = tmp_path / "mamba/seed-0/checkpoints/00000012/model.safetensors"
    before = finished.stat().st_mtime_ns
    again = compare(CONTENDERS[:3], base, 1, tmp_path, silent=True)
    assert finished.stat().st_mtime_ns == before
    for resumed, run in zip(again.runs, whole.runs, strict=False):
        assert resumed.curve == run.curve


@pytest.mark.slow  # `jobs = 2` of the next one is quick
def test_runs_at_once_come_to_the_same(base, compared, tmp_path):
    """In processes of their own, on the backend that they choose."""
    again = compare(CONTENDERS[:3], base, 1, tmp_path / "runs", jobs=2, silent=True)
    for run, alone in zip(again.runs, compared[0].runs, strict=False):
        assert [loss for _, loss in run.curve] == pytest.approx([loss for _, loss in alone.curve], abs=1e-3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_diverges_is_in_the_table(base, jobs, tmp_path):
    """And the others are finished; what diverged is not tried again."""
    wild = Contender("wild", MAMBA, {"learning_rate": 1e30})
    for _ in range(2):
        mamba, other = compare([CONTENDERS[0], wild], base, 1, tmp_path, jobs=jobs, silent=True).rows
        assert mamba.seeds == (0,)
        assert (other.seeds, other.missing, other.verdict) == ((), "1 of 1 diverged", "1 of 1 diverged")
        assert cells([mamba, other])[1][3:9] == ("1 of 1 diverged", "–", "–", "–", "–", "–")
        assert len(read_history(tmp_path / "wild" / "seed-0").failure) == 1
    assert "wild: 1 of 1 diverged" in (tmp_path / "report.html").read_text()


def test_other_runs_are_not_mixed_in(base, compared):
    out = compared[1]
    with pytest.raises(ValueError, match=r"seed-0 was made with steps = 12, not 13; choose another --out"):
        compare(CONTENDERS, TrainConfig(**{**vars(base), "steps": 13}), 2, out, silent=True)
    with pytest.raises(ValueError, match="seeds is 0"):
        compare(CONTENDERS, base, 0, out, silent=True)


def test_results_outlive_their_runs(base, compared, tmp_path, capsys):
    """What is left of a comparison is not overwritten; a single lost run is trained again, and that is said."""
    for name in ("results.json", "mamba", "moe"):
        source = compared[1] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.rmtree(tmp_path / "moe" / "seed-0")
    again = compare([CONTENDERS[0], CONTENDERS[2]], base, 1, tmp_path)
    assert "results of moe/seed-0, whose directories are gone: trained again" in capsys.readouterr().out
    assert again.runs[1].curve == compared[0].runs[2].curve
    shutil.rmtree(tmp_path / "mamba")
    shutil.rmtree(tmp_path / "moe")
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"none of their directories is left.*choose another --out or remove it"):
        compare([CONTENDERS[0], CONTENDERS[2]], base, 1, tmp_path, silent=True)
    assert (tmp_path / "results.json").read_bytes() == before
    for damaged in (b"{", b'{"runs": [{"name": "mamba"}]}'):
        (tmp_path / "results.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"results.json is damaged or of another version"):
            compare([CONTENDERS[0], CONTENDERS[2]], base, 1, tmp_path, silent=True)


def test_active_chooses_the_width_of_experts():
    """Within 1% of the budget, whatever else is changed, in every kind of layer that has experts."""
    changes = "d_model=128,n_blocks=4,n_experts=32"
    for text in (f"moe-mamba-25m,active=0.93M,{changes}", f"moe-mamba-25m-plus,{changes},active=930000"):
        contender = parse_contender(text)
        assert contender.recipe == {}
        assert abs(count_parameters(contender.model).active / 0.93e6 - 1) <= 0.01
    few = parse_contender("moe-mamba-25m,d_model=128,active=0.93M,n_blocks=4,n_experts=4").model  # a smaller router
    assert few.experts.d_expert > parse_contender(f"moe-mamba-25m,active=0.93M,{changes}").model.experts.d_expert
    dense = parse_contender("transformer-25m,d_model=128,n_blocks=4,n_heads=2,active=0.93M").model  # by d_ff
    assert abs(count_parameters(dense).active / 0.93e6 - 1) <= 0.01
    for text, why in {
        "mamba-25m,active=1M": "needs experts",
        "moe-mamba-tiny,active=10": "within 1% by d_expert; the nearest is",
        "moe-mamba-tiny,active=much": "expected a number above 0",
        "moe-mamba-tiny,active=0": "expected a number above 0",
    }.items():
        with pytest.raises(ValueError, match=why):
            parse_contender(text)


def _tested(*losses: float) -> Test:
    blocks = tuple((1 / len(losses), loss) for loss in losses)
    return Test(1000, sum(losses) / len(losses), 0.01, None, None, blocks)


def test_the_error_over_the_text_is_of_paired_blocks():
    """Two models on the same text: what makes a part of it hard falls away."""
    ours, theirs = _tested(3.0, 5.0, 4.0, 6.0), _tested(3.1, 5.3, 4.2, 6.2)
    differences = [-0.1, -0.3, -0.2, -0.2]
    assert error_of_difference(ours, theirs) == pytest.approx(statistics.stdev(differences) / 2)
    assert error_of_difference(ours, theirs) < ours.standard_error / 5
    assert error_of_difference(ours, _tested(3.0, 5.0)) is None and error_of_difference(ours, None) is None


def test_the_test_is_kept_and_shown_beside_the_rest():
    """In results.json, table, claims and headline; and nothing of it where no run has one."""
    found = comparisons.comparison()
    before = markdown([found])
    assert "test loss" not in before and '"test"' not in json.dumps(found.to_dict()["runs"])
    runs = [
        dataclasses.replace(run, test=_tested(4.0 - len(run.model) / 10 + run.seed / 50, 4.2 - len(run.model) / 10))
        for run in found.runs
    ]
    rows = summarise(runs, comparisons.MODELS, 32)
    found = Comparison.from_dict(json.loads(json.dumps(dataclasses.replace(found, rows=rows, runs=runs).to_dict())))
    assert [run.test for run in found.runs] == [
        dataclasses.replace(run.test, loss=run.test.loss, blocks=tuple(map(tuple, run.test.blocks))) for run in runs
    ]
    text = markdown([found])
    assert "test loss" in text and "vs its capacity" in text and "on the test text" in text
    assert "lower, one seed (−0.4000 nats, ± 0.0000 over the text)" in text
    claim = Claim("experts-8", "mamba")
    assert verdict(claim, found.rows, "capped_test").startswith("lower, one seed (−0.4000 nats)")


def test_a_test_that_cannot_be_is_refused():
    values = comparisons.comparison().to_dict()
    for test, said in (
        ({"tokens": 0, "loss": 1.0}, "greater than 0"),
        ({"tokens": 5, "loss": 1.0, "blocks": [[2.0, 1.0]]}, "weight between 0 and 1"),
        ({"tokens": 5, "loss": 1.0, "blocks": [[0.5]]}, "weight between 0 and 1"),
    ):
        values["runs"][0]["test"] = test
        with pytest.raises(ValueError, match=said):
            Comparison.from_dict(json.loads(json.dumps(values)))


# Branches


def test_a_branch_is_named_by_its_trunk():
    trunk, other, short = parse_contenders(
        ["mamba-tiny,learning_rate=0.01", "b=mamba-tiny", "short=@mamba-tiny,steps=5"]
    )
    assert (short.trunk, short.model) == ("mamba-tiny", trunk.model) and other.trunk is None
    assert short.recipe == {"learning_rate": 0.01, "steps": 5}
    for texts, said in (
        (["a=mamba-tiny", "b=@c,steps=5"], "write NAME=@MODEL,steps=N with one of a"),
        (["a=mamba-tiny", "b=@a"], "needs steps"),
        (["a=mamba-tiny", "b=@a,steps=5,learning_rate=1"], "it has steps, learning_rate"),
        (["b=@a,steps=5", "a=mamba-tiny"], "the baseline, cannot"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_contenders(texts)


def test_a_branch_is_the_run_that_had_its_steps_from_the_beginning(base, tmp_path):
    """Bit for bit, for the price of its cool-down; and the comparison goes on where it stopped."""
    base = dataclasses.replace(base, schedule="wsd", cooldown=0.5, steps=8, warmup=0.125, save_every=8, eval_every=2)
    trunk, branch = Contender("mamba", MAMBA, {}), Contender("short", MAMBA, {"steps": 4}, "mamba")
    found = compare([trunk, branch], base, 1, tmp_path / "out", silent=True)
    assert all(run.finished for run in found.runs) and found.rows[1].own_schedule
    whole = dataclasses.replace(
        base, model=MAMBA, run=str(tmp_path / "whole"), steps=4, warmup=0.25
    )  # as many steps of warm-up
    train(whole, report=Report(silent=True))
    ours, theirs = (load(place)[0].state_dict() for place in (tmp_path / "out/short/seed-0", tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = sorted(path.name for path in (tmp_path / "out/mamba/seed-0/checkpoints").iterdir())
    assert saved == ["00000002", "00000008"]
    text = markdown([found])
    assert "short ran for 4 steps" in text and "a branch of mamba, whose steps it shares" in text
    shutil.rmtree(tmp_path / "out/short")
    again = compare([trunk, branch], base, 1, tmp_path / "out", silent=True)
    assert again.rows[1].loss == found.rows[1].loss
    shutil.rmtree(tmp_path / "out/short")
    shutil.rmtree(tmp_path / "out/mamba/seed-0/checkpoints/00000002")
    with pytest.raises(ValueError, match="which was not saved; remove"):
        compare([trunk, branch], base, 1, tmp_path / "out", silent=True)


@pytest.mark.parametrize(
    ("changes", "steps", "said"),
    [({"schedule": "cosine"}, 4, "needs --schedule wsd"), ({}, 7, "must lie between"), ({"warmup": 0.5}, 4, "between")],
)
def test_branches_that_cannot_be(base, changes, steps, said, tmp_path):
    base = dataclasses.replace(base, **({"schedule": "wsd", "cooldown": 0.5, "steps": 8} | changes))
    pair = [Contender("mamba", MAMBA, {}), Contender("short", MAMBA, {"steps": steps, "cooldown": 0.25}, "mamba")]
    with pytest.raises(ValueError, match=said):
        compare(pair, base, 1, tmp_path, silent=True)


def test_the_terminal_shows_the_test_too(tmp_path, capsys):
    found = comparisons.comparison()
    tell(found, tmp_path)
    assert "test loss" not in capsys.readouterr().out
    runs = [dataclasses.replace(run, test=_tested(4.0 + run.seed, 4.2)) for run in found.runs]
    rows = summarise(runs, comparisons.MODELS, 32)
    tell(dataclasses.replace(found, rows=rows, runs=runs), tmp_path)
    shown = capsys.readouterr().out
    assert "test loss" in shown and "on the test text" in shown and "vs its capacity" in shown
