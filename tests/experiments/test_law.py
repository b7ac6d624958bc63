"""The scaling law: recovered from points that a known one made, its errors told, and plans made by it."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import comparisons
import numpy as np
import pytest

from moemamba import count_parameters, preset
from moemamba.cli import run
from moemamba.experiments import law
from moemamba.experiments.law import Anchor, Fitted, Law, Point, fit, plans, points, read_law, write_law
from moemamba.experiments.law.planning import CONTEXT, shaped
from moemamba.experiments.law.points import expansion
from moemamba.reading import amount

FITTED = Fitted(9, 9, 0.0, 0.0, 0.0, 0.0, (1e5, 1e7), (1e7, 1e9), (1.0, 32.0), "text", "gpt2", "test")
TRUE = Law(38.0, -0.12, -0.30, 0.008, 60.0, -0.02, -0.22, -0.004, 1.6, FITTED, (Anchor(1, 128, 4e-3, 32768, 4e8),))


def made(noise: float = 0.0) -> list[Point]:
    drawn = np.random.default_rng(0)
    return [
        Point(f"m{n}-{e}", n, d, e, TRUE.loss(n, d, e) + noise * drawn.normal(), 64 + 64 * k, 0.004 / (1 + k), 32768)
        for k, n in enumerate((1e5, 5e5, 2e6, 8e6))
        for e in (1.0, 8.0, 32.0, 128.0)
        for d in (6e7, 1.2e8, 2.4e8)
    ]


def test_the_formula_is_the_papers():
    n, d, e = 3e6, 5e8, 16.0
    expected = (
        TRUE.a * e**TRUE.d * n ** (TRUE.alpha + TRUE.g * math.log(e))
        + TRUE.b * e**TRUE.w * d ** (TRUE.beta + TRUE.z * math.log(e))
        + TRUE.c
    )
    assert TRUE.loss(n, d, e) == pytest.approx(expected)
    with pytest.raises(ValueError, match="tokens is 0"):
        TRUE.loss(n, 0)


def test_a_known_law_is_recovered():
    pytest.importorskip("scipy")
    law = fit(made(), "text", "gpt2", "test")
    assert law.fitted.residual < 1e-3 and law.fitted.held_out < 5e-3
    assert (law.fitted.points, law.fitted.models) == (48, 16)
    for n, d, e in ((1e6, 1e9, 1), (2.5e7, 1e9, 32)):  # beyond what was seen
        assert law.loss(n, d, e) == pytest.approx(TRUE.loss(n, d, e), abs=0.03)
    assert law.beyond(2.5e7, 1e8, 8) == ["3.12 times the most active parameters that it was fitted to"]
    noisy = fit(made(0.01), "text", "gpt2", "test")
    assert 0.005 < noisy.fitted.residual < 0.009 < noisy.fitted.held_out < 0.03
    assert {(each.experts, each.d_model, each.learning_rate) for each in noisy.anchors} == {
        (e, 256, 0.001) for e in (1.0, 8.0, 32.0, 128.0)
    }


def test_an_outlier_does_not_bend_the_law():
    pytest.importorskip("scipy")
    found = made()
    found[7] = found[7]._replace(loss=found[7].loss + 0.5)
    law = fit(found, "text", "gpt2", "test")
    assert law.loss(1e6, 1e8, 8) == pytest.approx(TRUE.loss(1e6, 1e8, 8), abs=5e-3)
    assert law.fitted.largest == pytest.approx(0.5, abs=0.02)


def test_points_that_tell_no_law(monkeypatch):
    with pytest.raises(ValueError, match=r"10 models or more.*there are 5"):
        fit(made()[:5], "", "", "test")
    with pytest.raises(ValueError, match="all with the same experts"):
        fit([point for point in made() if point.experts == 1], "", "", "test")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"pip install 'moemamba\[laws\]'"):
        fit(made(), "", "", "test")


def test_points_are_those_of_comparisons():
    found = comparisons.comparison()
    (first, *_), measure = points([found])
    assert measure == "held-out" and first.tokens == 30 * 64 and first.loss == found.rows[0].loss.mean
    assert first.active == count_parameters(comparisons.MODELS["mamba"]).active
    assert [point.experts for point in points([found])[0]] == [1, 4, 8]
    assert points([found])[0][2].learning_rate == 0.2
    other = dataclasses.replace(found, settings=found.settings | {"data": "another"})
    with pytest.raises(ValueError, match="data is another in one comparison and text in another"):
        points([found, other])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mamba-25m", 1),
        ("moe-mamba-25m", 42),
        ("moe-mamba-25m-plus", 32),
        ("moe-mamba-tiny", 8),
        ("routed-mamba-small", 8),
    ],
)
def test_experts_for_each_that_a_token_visits(name, expected):
    assert expansion(preset(name)) == pytest.approx(expected)


@pytest.mark.parametrize("active", [2e5, 9.3e5, 25e6, 3e8])
def test_models_have_the_active_size_that_was_asked_for(active):
    for experts in (1, 8, 32):
        model = shaped(active, experts)
        assert count_parameters(model).active == pytest.approx(active, rel=0.08 if experts == 1 else 0.01)
        assert expansion(model) == pytest.approx(experts)
    assert shaped(26.7e6, 1).d_model in range(416, 609)
    with pytest.raises(ValueError, match="from 10k to 1000B"):
        shaped(3, 1)


def test_plans_scale_rate_and_batch_from_what_was_fitted():
    (plan,) = plans(TRUE, 25e6, 4e8, [1])
    assert plan.learning_rate == pytest.approx(4e-3 * 128 / plan.model.d_model)
    assert plan.batch_size * CONTEXT == 32768 and plan.steps == round(4e8 / 32768)
    (longer,) = plans(TRUE, 25e6, 1.6e9, [1])
    assert longer.batch_size == 2 * plan.batch_size and longer.loss < plan.loss
    assert plan.loss == TRUE.loss(plan.parameters.active, 4e8, 1)
    assert [each.experts for each in plans(TRUE, 25e6, 4e8)] == [1, 4, 8, 16, 32]


def test_a_law_is_what_was_written(tmp_path):
    write_law(TRUE, tmp_path / "law.json")
    assert read_law(tmp_path / "law.json") == TRUE
    values = json.loads((tmp_path / "law.json").read_text())
    for changes, said in (
        ({"format": 9}, "no scaling law of format 1"),
        ({"a": -1.0}, "a is -1"),
        ({"alpha": "x"}, "alpha is 'x'"),
        ({"anchors": []}, "anchors is empty"),
        ({"fitted": values["fitted"] | {"tokens": [5.0]}}, "the least and the largest"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=said):
            read_law(tmp_path / "bad.json")


def test_the_command_plans(tmp_path, capsys):
    write_law(TRUE, tmp_path / "law.json")
    where = ["--law", str(tmp_path / "law.json"), "--device", "cpu"]
    run(["plan", "--active", "25M", "--tokens", "10B", *where, "--speed", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [each["experts"] for each in found["plans"]] == [1, 4, 8, 16, 32]
    plan = found["plans"][found["chosen"]]
    assert plan["loss"] == min(each["loss"] for each in found["plans"] if each["memory"] <= found["memory"])
    assert plan["seconds"] == pytest.approx(plan["operations"] / 1e12) and plan["steps"] > 1
    run(["plan", "--active", "25M", "--tokens", "10B", *where, "--experts", "8"])
    shown = capsys.readouterr().out
    assert "expected loss" in shown and "Beyond it: 10 times the most tokens" in shown
    command = next(text for text in shown.splitlines() if text.startswith("moemamba train"))
    from moemamba.cli.train import read

    trained = read(command.split()[2:]).config
    assert count_parameters(trained.model).active == pytest.approx(25e6, rel=0.01)
    assert expansion(trained.model) == pytest.approx(8)
    assert trained.steps * trained.batch_size * trained.context == pytest.approx(1e10, rel=0.01)
    for words, said in (
        (["plan"], "none comes with this version: fit one to comparisons of your own .*--law law.json"),
        (["plan", *where, "--active", "big"], "active is 'big'"),
        (["plan", "--fit", str(tmp_path)], "--fit needs comparisons, and --law"),
    ):
        with pytest.raises(ValueError, match=said):
            run(words)


def test_help_promises_no_law_that_is_not_there(capsys):
    assert not list(Path(law.__file__).parent.glob("*.json"))
    with pytest.raises(SystemExit):
        run(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "none comes with this package" in shown and "has to be given" in shown and "package's own" not in shown


def test_the_command_fits(tmp_path, capsys):
    pytest.importorskip("scipy")
    found = comparisons.comparison()
    found.write(tmp_path / "results.json")
    with pytest.raises(ValueError, match="there are 3"):
        run(["plan", "--fit", str(tmp_path), "--law", str(tmp_path / "law.json")])


def test_amounts():
    assert (amount("25M", "x"), amount("0.5k", "x"), amount("10B", "x"), amount("7", "x")) == (25e6, 500, 1e10, 7)
    with pytest.raises(ValueError, match="x is '0'"):
        amount("0", "x")
