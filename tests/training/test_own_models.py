"""Runs that are watched, and models of one's own: trained, resumed, saved and loaded, or refused in a sentence."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import moemamba as mm
from moemamba import ExpertsConfig, ModelConfig, MoEMamba, Moment, TrainConfig, load, save, train
from moemamba.checkpoint import CheckpointError
from moemamba.cli.mistakes import as_options
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer

SILENT = Report(silent=True)
TINY = ModelConfig("ME", n_blocks=1, d_model=8, experts=ExpertsConfig(2))
FIRST = Path(__file__).parents[1] / "fixtures" / "v0.1"


class Scaled(nn.Module):
    """A norm of one's own."""

    def __init__(self, d_model):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return x * self.scale


def own(seed=0):
    torch.manual_seed(seed)
    model = MoEMamba(TINY)
    model.layers[0].norm = Scaled(8)
    return model


@pytest.fixture
def config(tmp_path):
    often = {"log_every": 2, "eval_every": 4, "eval_tokens": 64, "save_every": 4}
    return TrainConfig(
        TINY, str(FIRST / "prepared"), run=str(tmp_path / "run"), steps=8, batch_size=2, context=16, **often
    )


def lines(config):
    return list(map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines()))


def same(one, two):
    return all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def other(config, name, **changes):
    return dataclasses.replace(config, run=f"{config.run}-{name}", **changes)


def test_a_watcher_sees_every_line_and_the_model(config):
    seen: list[Moment] = []

    def watch(moment):
        assert moment.model.training == (moment.kind != "nothing")
        moment.model.eval()
        mm.generate(moment.model, [1, 2], 3, temperature=0)
        seen.append(moment)

    train(config, watch=watch, report=SILENT)
    assert [moment.line for moment in seen] == lines(config)
    assert {moment.kind for moment in seen} >= {"data", "train", "router", "evaluation"}
    plain = train(other(config, "plain"), report=SILENT)
    assert same(plain.model, seen[-1].model)  # to watch changes nothing
    assert torch.is_grad_enabled()


def test_a_watcher_ends_the_run_in_good_order(config):
    ended = train(config, watch=lambda moment: moment.kind == "train" and moment.step >= 6, report=SILENT)
    assert ended.step == 6 and (Path(config.run) / "checkpoints" / "00000006").is_dir()
    on = train(config, resume=True, report=SILENT)
    assert same(on.model, train(other(config, "whole"), report=SILENT).model)


def test_a_model_of_ones_own_is_trained_and_resumed(config):
    model = own()
    assert train(config, model=model, report=SILENT).model is model
    parted = other(config, "parted")
    train(parted, model=own(), stop=5, report=SILENT)
    with pytest.raises(ValueError, match=r"whose layers\.0\.norm is .*Scaled; build it again and hand it in"):
        train(parted, resume=True, report=SILENT)
    with pytest.raises(ValueError, match=r"layers\.0\.norm is as moemamba builds it, but .* began with .*Scaled"):
        train(parted, resume=True, model=MoEMamba(TINY), report=SILENT)
    assert same(train(parted, resume=True, model=own(1), report=SILENT).model, model)
    with pytest.raises(CheckpointError, match=r"is of a model whose layers\.0\.norm is .*Scaled.*into=model"):
        load(config.run)
    assert same(load(config.run, into=own(2))[0], model)


def test_weights_of_ones_own_need_not_come_again(config):
    torch.manual_seed(5)
    model = MoEMamba(TINY)
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    whole = train(config, model=model, report=SILENT).model
    parted = other(config, "parted")
    model = MoEMamba(TINY)
    model.load_state_dict(begun)
    train(parted, model=model, stop=5, report=SILENT)
    assert same(train(parted, resume=True, report=SILENT).model, whole)
    assert not same(whole, train(other(config, "seed"), report=SILENT).model)
    with pytest.raises(ValueError, match="began without a model from outside"):
        train(other(config, "seed"), resume=True, model=model, report=SILENT)


def test_the_beginning_is_remembered(config):
    """A run that was stopped before it saved anything."""
    model = own()

    def fail(moment):
        if moment.kind == "train":
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        train(config, model=model, watch=fail, report=SILENT)
    with pytest.raises(ValueError, match="has saved nothing yet, and began with weights that were handed in"):
        train(config, resume=True, model=own(1), report=SILENT)
    train(config, resume=True, model=own(), report=SILENT)


def test_models_that_cannot_be_trained(config, tmp_path):
    with pytest.raises(ValueError, match=r"embedding\.weight is torch\.bfloat16.*model\.float\(\)"):
        train(config, model=MoEMamba(TINY).bfloat16(), report=SILENT)
    with pytest.raises(ValueError, match="model is a Linear; train takes a MoEMamba"):
        train(config, model=nn.Linear(2, 2), report=SILENT)
    with pytest.raises(ValueError, match="the model knows 64 tokens, but the tokenizer has 257"):
        train(config, model=MoEMamba(TINY.replace(vocab_size=64)), report=SILENT)
    save(tmp_path / "saved", MoEMamba(TINY), ByteTokenizer())
    with pytest.raises(ValueError, match="leave start and branch out"):
        train(dataclasses.replace(config, start=str(tmp_path / "saved")), model=MoEMamba(TINY), report=SILENT)


def test_frozen_parts_stay(config):
    model = own()
    model.embedding.requires_grad_(False)
    begun = model.embedding.weight.clone()
    train(config, model=model, stop=5, report=SILENT)
    again = own(3)
    again.embedding.requires_grad_(False)
    result = train(config, resume=True, model=again, report=SILENT)
    assert torch.equal(result.model.embedding.weight, begun)
    large = other(config, "large")
    wide = MoEMamba(TINY.replace(vocab_size=300))  # room for tokens to come
    train(large, model=wide, stop=4, report=SILENT)
    assert train(large, resume=True, report=SILENT).model.config.vocab_size == 300


def test_saving_without_a_tokenizer(tmp_path):
    model = own()
    save(tmp_path / "own", model)
    loaded, tokenizer = load(tmp_path / "own", into=own(1))
    assert same(loaded, model) and tokenizer.vocab_size == TINY.vocab_size
    with pytest.raises(ValueError, match="saved without a tokenizer: give it token ids"):
        tokenizer.encode("text")
    save(tmp_path / "again", MoEMamba(TINY), tokenizer)
    assert load(tmp_path / "again", dtype=torch.bfloat16)[0].head.weight.dtype == torch.bfloat16
    (tmp_path / "again" / "model.safetensors").rename(tmp_path / "lost")
    with pytest.raises(CheckpointError):
        load(tmp_path / "again")


def test_words_are_those_of_who_asks(config):
    train(config, stop=4, report=SILENT)
    with pytest.raises(FileExistsError, match=r"resume it \(resume=True\)") as error:
        train(config, report=SILENT)
    assert "--" not in re.sub("[a-z]--[a-z]", "", str(error.value))
    assert "resume it (--resume)" in as_options(str(error.value))
    said = as_options('go on with on_failure="skip", shard="parameters" or expert_parallel=N')
    assert said == "go on with --on-failure skip, --shard parameters or --expert-parallel N"


def test_nothing_of_the_caller_enters_a_run(config):
    """Where training is started from: no gradients, autocast, another device, a thread."""
    whole = train(config, report=SILENT).loss
    with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = train(other(config, "around"), report=SILENT)
    assert found.loss == whole and "MoEMamba(" not in repr(found)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, other(config, "thread"), report=SILENT).result().loss == whole
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"default dtype is torch\.float64, and weights are trained in float32"):
            train(other(config, "wide"), report=SILENT)
    finally:
        torch.set_default_dtype(torch.float32)
