"""Averaged weights and rates by name: what they are, that resuming keeps their bits, and that all can read them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, TrainConfig, evaluate, load, train
from moemamba.checkpoint import CheckpointError, Damaged
from moemamba.cli.options import read
from moemamba.cli.train import Train
from moemamba.config import ExpertsConfig
from moemamba.data.corpora import find_tokenizer, open_corpora
from moemamba.experiments.compare import compare, parse_contender, parse_contenders
from moemamba.experiments.results import read_results
from moemamba.host.progress import Report
from moemamba.training.update import Average, make_optimizer

SILENT = Report(silent=True)
TINY = ModelConfig("ME", n_blocks=1, d_model=8, experts=ExpertsConfig(2, bias_rate=0.01))
FIRST = Path(__file__).parents[1] / "fixtures" / "v0.1"


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        TINY,
        str(FIRST / "prepared"),
        run=str(tmp_path / "run"),
        steps=8,
        batch_size=2,
        context=16,
        log_every=2,
        eval_every=4,
        eval_tokens=64,
        save_every=4,
        average=0.8,
    )


def lines(config, kind):
    found = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def tensors(path):
    return load(path)[0].state_dict()


def test_the_average_is_that_of_every_step(config):
    each = dataclasses.replace(config, run=f"{config.run}-each", average=None, save_every=1, keep=20, eval_every=8)
    train(each, report=SILENT)
    train(config, report=SILENT)
    steps = [tensors(Path(each.run) / "checkpoints" / f"{step:08d}") for step in range(1, 9)]
    torch.manual_seed(config.seed)
    expected = {name: value.double() for name, value in MoEMamba(TINY).state_dict().items()}
    for step, weights in enumerate(steps, 1):
        keep = min(0.8, (1 + step) / (10 + step))
        expected = {name: keep * value + (1 - keep) * weights[name] for name, value in expected.items()}
    found = tensors(f"{config.run}/averaged")
    for name, value in found.items():
        if name.endswith("balance_bias"):
            assert torch.equal(value, steps[-1][name])  # buffers are the model's own
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    assert all(map(torch.equal, tensors(config.run).values(), steps[-1].values()))  # it changes nothing of the run


def test_both_are_evaluated(config):
    result = train(config, report=SILENT)
    last = lines(config, "evaluation")[-1]
    assert last["averaged"] == result.evaluation.averaged != last["loss"]
    model = load(f"{config.run}/averaged")[0]
    text = open_corpora(config.reads(), find_tokenizer(config.reads()), SILENT).validation
    assert evaluate(model, text, context=16, most=64).loss == pytest.approx(last["averaged"], rel=1e-5)
    assert all(map(torch.equal, result.model.state_dict().values(), tensors(config.run).values()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_keeps_the_bits(config, optimizer):
    config = dataclasses.replace(config, optimizer=optimizer, rates={"*.router": 0.5})
    halves = dataclasses.replace(config, run=f"{config.run}-halves")
    train(config, report=SILENT)
    train(halves, stop=5, report=SILENT)
    train(halves, resume=True, report=SILENT)
    for place in ("", "/averaged"):
        assert all(map(torch.equal, tensors(config.run + place).values(), tensors(halves.run + place).values()))
    assert lines(config, "evaluation")[-1]["averaged"] == lines(halves, "evaluation")[-1]["averaged"]


def test_what_is_missing_is_named(config):
    train(config, stop=4, report=SILENT)
    (Path(config.run) / "checkpoints" / "00000004" / "averaged" / "model.safetensors").unlink()
    with pytest.raises(Damaged, match=r"averaged.model\.safetensors is missing"):
        train(config, resume=True, report=SILENT)
    plain = dataclasses.replace(config, average=None, run=f"{config.run}-plain")
    train(plain, stop=4, report=SILENT)
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        load(f"{plain.run}/averaged")
    with pytest.raises(ValueError, match=r"average is 0\.8, but .* began with None"):
        train(dataclasses.replace(plain, average=0.8), resume=True, report=SILENT)


def test_a_run_begins_and_branches_with_them(config):
    train(config, report=SILENT)
    start = dataclasses.replace(config, run=f"{config.run}-start", start=f"{config.run}/averaged", rates={"*": 0.0})
    train(start, stop=2, report=SILENT)
    for place in ("", "/averaged"):
        found = tensors(start.run + place)
        begun = tensors(f"{config.run}/averaged").items()
        assert all(torch.equal(value, found[name]) for name, value in begun if "bias" not in name)
    train(start, resume=True, report=SILENT)
    branch = dataclasses.replace(config, run=f"{config.run}-branch", branch=config.run, steps=12)
    train(branch, report=SILENT)
    longer = dataclasses.replace(config, steps=12)
    train(longer, resume=True, report=SILENT)
    for place in ("", "/averaged"):
        assert all(map(torch.equal, tensors(branch.run + place).values(), tensors(config.run + place).values()))


def test_a_comparison_has_both(config, tmp_path):
    base = dataclasses.replace(config, average=None, steps=4)
    small = "mamba-tiny,d_model=8,n_blocks=1"
    names = [f"a={small}", f'b={small},average=0.5,rates={{"*.A_log":0,"*.D":2}}']
    compare(parse_contenders(names), base, 1, tmp_path / "both", silent=True)
    rows = read_results(tmp_path / "both").rows
    assert not rows[0].averaged.values and len(rows[1].averaged.values) == 1
    assert rows[1].averaged.values[0] != rows[1].loss.values[0]
    assert "| averaged |" in (tmp_path / "both" / "results.md").read_text()
    with pytest.raises(ValueError, match="rates has -1"):
        TrainConfig(**parse_contender('mamba-tiny,rates={"*":-1}').recipe)


def test_rates_reach_what_they_name(config):
    config = dataclasses.replace(config, rates={"layers.1": 0, "*.router.weight": 1, "embedding": 0.5}, average=None)
    torch.manual_seed(0)
    begun = MoEMamba(TINY).state_dict()
    after = train(dataclasses.replace(config, steps=1), report=SILENT).model.state_dict()
    for name, value in after.items():
        still = torch.equal(value, begun[name])
        assert still == (name.startswith("layers.1.") and ".router." not in name), name
    plain = train(dataclasses.replace(config, steps=1, rates={}, run=f"{config.run}-plain"), report=SILENT).model
    both = (after, plain.state_dict())
    moved = [float((each["embedding.weight"] - begun["embedding.weight"]).abs().max()) for each in both]
    assert moved[0] == pytest.approx(moved[1] / 2, rel=0.01)


def test_rates_that_fit_nothing(config):
    with pytest.raises(ValueError, match=r"rates names 'rooter', which fits no parameter; these are embedding\.weight"):
        train(dataclasses.replace(config, rates={"rooter": 2.0}), report=SILENT)
    train(dataclasses.replace(config, rates={"*.router": 2.0}), stop=4, report=SILENT)
    with pytest.raises(ValueError, match=r"rates\.\*\.router is None, but .* began with 2\.0"):
        train(config, resume=True, report=SILENT)
    for average in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            TrainConfig(average=average)


def test_rates_on_the_command_line():
    found = read(Train, ["--rates", "*.router=0.5", "embedding=2", "--average", "0.99"], "train", None)
    config = found.training if hasattr(found, "training") else found.config
    assert (config.rates, config.average) == ({"*.router": 0.5, "embedding": 2.0}, 0.99)
    with pytest.raises(ValueError, match="write NAME=VALUE"):
        read(Train, ["--rates", "router"], "train", None)


def test_an_optimizer_on_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.2, betas=(0.8, 0.9), rates={"1": 0.5})
    groups = {(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups}
    assert groups == {(0.1, 0.2, 1), (0.1, 0.0, 1), (0.05, 0.0, 2)} and optimizer.defaults["betas"] == (0.8, 0.9)
    average = Average(model, 0.5)
    with torch.no_grad():
        model[0].weight += 1
    average.update(100)
    with average.in_place():
        lowered = model[0].weight.detach().clone()
    torch.testing.assert_close(model[0].weight - lowered, torch.full((3, 4), 0.5))


def test_the_average_is_tested_too(config):
    """On the text that nothing was chosen by, as if it was the model."""
    found = train(config, report=SILENT)
    corpora = open_corpora(config.reads(), find_tokenizer(config.reads()), SILENT)
    model = load(f"{config.run}/averaged")[0]
    expected = evaluate(model, corpora.test, context=16, batch_size=2).loss
    (line,) = lines(config, "test")
    assert line["averaged"] == found.test.averaged == pytest.approx(expected, abs=1e-6) != line["loss"]
