"""The paper's tables: models of its sizes, claims judged as they should be, and one table run from end to end."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moemamba import MoEMamba, TrainConfig
from moemamba.cli import run
from moemamba.counting import count_parameters
from moemamba.experiments.page import verdict
from moemamba.experiments.paper import SCALES, TABLES, plan
from moemamba.experiments.paper.running import recipe
from moemamba.experiments.paper.tables import FRACTIONS
from moemamba.experiments.results import Claim, Spread, read_results
from moemamba.training.spread import check


def test_models_at_the_papers_scale_have_its_sizes() -> None:
    """Parameter counts of tables 1 and 4, and those of the ratio experiments, counted from the paper's formulas."""
    sizes = {
        (name, entry.name): count_parameters(entry.contender(SCALES["paper"]).model)
        for name, table in TABLES.items()
        for entry in table.entries
    }
    assert sizes["main", "mamba"].total == 27_131_904
    assert sizes["main", "moe-mamba"].total == 542_228_480
    assert sizes["main", "transformer-moe"].total == 545_406_976
    totals = [round(sizes["experts", f"experts-{n}"].total / 1e6) for n in (1, 4, 8, 16, 32)]
    assert totals == [26, 64, 114, 215, 416]
    assert sizes["main-100m", "moe-mamba"].total == 2_439_069_696
    assert [round(sizes["ratio", f"ratio-{name}"].total / 1e6) for name in FRACTIONS] == [403, 412, 416, 421, 426]


def test_the_plus_models_keep_their_proportions() -> None:
    """Experts of half the model's width, four of them as large as the paper's one; heads of 64 channels."""
    paper, small = (
        {entry.name: entry.contender(SCALES[scale]).model for entry in TABLES["plus"].entries}
        for scale in ("paper", "gpu")
    )
    counted = count_parameters(paper["moe-mamba-plus"])
    assert (counted.total, counted.active) == (416_743_936, 26_673_664)
    for models in (paper, small):
        experts, width = models["moe-mamba-plus"].experts, models["moe-mamba-plus"].d_model
        assert (experts.n_experts, experts.top_k, experts.d_expert) == (128, 4, width // 2)
        assert models["mamba-plus"].attention.n_heads == width // 64
        sizes = {name: count_parameters(model).active for name, model in models.items()}
        assert abs(sizes["moe-mamba-plus"] / sizes["mamba-plus"] - 1) < 0.02


@pytest.mark.parametrize("scale", SCALES)
def test_models_of_a_table_have_equal_active_size(scale: str) -> None:
    """Within 1% of Mamba's; the paper's own do not."""
    most = {"laptop": 0.01, "gpu": 0.01, "paper": 0.16}[scale]
    for name, table in TABLES.items():
        counts = [count_parameters(entry.contender(SCALES[scale]).model) for entry in table.entries]
        same = TABLES["main-100m" if name == "main-100m" else "main"].entries[0]
        mamba = count_parameters(same.contender(SCALES[scale]).model).active
        assert all(abs(count.active / mamba - 1) <= most for count in counts), table.title
        assert len({entry.name for entry in table.entries}) == len(table.entries)


def test_claims_are_about_entries() -> None:
    for table in TABLES.values():
        names = {entry.name for entry in table.entries}
        assert table.claims
        assert all({claim.better, claim.worse} <= names for claim in table.claims)


def _rows(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Any:
    return [
        SimpleNamespace(
            name=name,
            loss=Spread(values),
            accuracy=Spread(tuple(-v for v in values)),
            seeds=tuple(range(len(values))),
            missing="",
        )
        for name, values in (("a", ours), ("b", theirs))
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ((1.0, 1.1), (1.2, 1.31), "confirmed"),
        ((1.2, 1.31), (1.0, 1.1), "contradicted"),
        ((1.0, 1.3), (1.1, 1.2), "no clear difference"),
        ((1.0, 1.1), (1.01, 1.2), "no clear difference"),
        ((1.0,), (1.2,), "lower, one seed (−0.2000 nats)"),
        ((1.2,), (1.0,), "higher, one seed (+0.2000 nats)"),
        ((1.0, 1.1, 1.3), (1.2, 1.32, 1.49), "confirmed (−0.2033 ± 0.0088 nats, 3 seeds)"),
    ],
)
def test_verdicts(ours: tuple[float, ...], theirs: tuple[float, ...], found: str) -> None:
    assert verdict(Claim("a", "b"), _rows(ours, theirs)).startswith(found)
    swapped = found.split(" (")[0]
    if len(ours) == 1:  # more accurate is higher
        swapped = {"lower": "higher", "higher": "lower"}[found.split(",")[0]]
    assert verdict(Claim("a", "b", accuracy=True), _rows(ours, theirs)).startswith(swapped)


def test_a_table_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuning, comparison, verdicts; and the chosen rates are those that ended lowest."""
    tiny = dataclasses.replace(SCALES["laptop"], d_model=16, n_blocks=1, batch_size=2, context=16, tuning_steps=2)
    monkeypatch.setitem(SCALES, "laptop", tiny)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k}: {k * k}\n" for k in range(3000)))
    out = tmp_path / "out"
    options = ["--data", str(text), "--steps", "3", "--seeds", "1", "--eval-tokens", "64", "--out", str(out)]
    run(["paper", "mlp", *options, "--learning-rates", "0.000001", "0.03"])
    shown = capsys.readouterr().out
    assert "2 runs, 2 models with 1 seed, of 96 tokens (3 steps of 2 × 16) each" in shown
    assert (
        "before that 4 runs of 64 tokens (2 steps) to choose learning rates: 1e-06, 0.03 with mamba, mamba-mlp" in shown
    )
    assert "mamba below mamba-mlp" in shown
    written = (out / "results.md").read_text()
    assert "3.56" in written
    assert "+0.05" in written
    rates = json.loads((out / "tuning" / "learning-rates.json").read_text())
    for name, found in rates.items():
        assert found["losses"][f"{found['chosen']:g}"] == min(found["losses"].values())
        assert json.loads((out / name / "seed-0" / "train.json").read_text())["learning_rate"] == found["chosen"]
        assert ("0.06" in found["losses"]) == (found["chosen"] >= 0.03)  # widened where the best was the highest
    assert set(rates) == {"mamba", "mamba-mlp"}
    _pages_are_made_again(out, tmp_path)


def test_the_best_tuning_run_of_full_length_is_the_run_with_seed_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = dataclasses.replace(SCALES["laptop"], d_model=16, n_blocks=1, batch_size=2, context=16, tuning_steps=None)
    monkeypatch.setitem(SCALES, "laptop", tiny)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k}: {k * k}\n" for k in range(3000)))
    out = tmp_path / "out"
    command = ["paper", "mlp", "--data", str(text), "--steps", "2", "--seeds", "2", "--eval-tokens", "64"]
    command += ["--out", str(out), "--learning-rates", "0.001", "1e-5", "1e-7"]
    run(command)
    shown = capsys.readouterr().out
    assert "4 runs, 2 models with 2 seeds" in shown
    assert "the best of each is its run with seed 0" in shown
    assert shown.count("is saved in") >= 8  # more if a grid was widened
    assert "in all 512 tokens" in shown  # 6 runs to tune and 2 with another seed, of 2 x 2 x 16 tokens
    rates = json.loads((out / "tuning" / "learning-rates.json").read_text())
    for name, found in rates.items():
        tuned = out / "tuning" / f"{name}-lr{found['chosen']:g}" / "seed-0"
        assert (out / name / "seed-0" / "metrics.jsonl").read_bytes() == (tuned / "metrics.jsonl").read_bytes()
        assert json.loads((out / name / "seed-1" / "train.json").read_text())["learning_rate"] == found["chosen"]
        (row,) = (row for row in read_results(out).rows if row.name == name)
        assert row.loss.values[0] == pytest.approx(found["losses"][f"{found['chosen']:g}"])
        shutil.rmtree(out / name / "seed-0")
    run(command)  # again from the tuning's runs
    assert "is saved in" not in capsys.readouterr().out
    assert len(read_results(out).runs) == 4


def _pages_are_made_again(out: Path, place: Path) -> None:
    """From results.json alone, in a folder without runs; several on one page."""
    alone = place / "alone"
    alone.mkdir()
    (alone / "results.json").write_bytes((out / "results.json").read_bytes())
    run(["report", str(alone), "--out", str(place / "again.md")])
    assert (place / "again.md").read_text() == (out / "results.md").read_text()
    run(["report", str(alone), str(alone / "results.json"), "--out", str(place / "both.html")])
    page = (place / "both.html").read_text()
    assert page.count("<h2 id=") == page.count("<svg viewBox") / 4 == 2
    assert page.count(", one seed (") == 2 * 3  # a claim: on the test text, held-out and in training
    for arguments, message in (([str(place)], "results.json"), ([str(alone), "--out", "page.pdf"], "in .html or .md")):
        with pytest.raises((ValueError, OSError), match=message):
            run(["report", *arguments])


def test_an_unknown_table_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        run(["paper", "maim"])
    assert "experts" in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_run_at_a_gpus_scale(name: str) -> None:
    """Two seeds, rates tuned over whole runs, models that can be built and trained in one batch."""
    scale, table = SCALES["gpu"], TABLES[name]
    lines = "\n".join(plan(table, scale))
    assert f"{len(table.entries)} models with 2 seeds" in lines and "is its run with seed 0" in lines
    base = recipe(TrainConfig(), table, scale)
    for entry in table.entries:
        contender = entry.contender(scale)
        config = dataclasses.replace(base, model=contender.model, **contender.recipe)
        check(config, 1)
        with torch.device("meta"):
            MoEMamba(config.model)
