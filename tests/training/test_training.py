"""Training: what is minimised, how it steps, and that stopping, crashing and resuming change nothing."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import moemamba
from moemamba import ModelConfig, MoEMamba, TrainConfig, evaluate, load, train
from moemamba.config import AttentionConfig, ExpertsConfig, RoutedMambaConfig
from moemamba.data.batches import Tokens
from moemamba.host import progress
from moemamba.host.progress import Report
from moemamba.reading import from_dict, to_dict
from moemamba.text import ByteTokenizer
from moemamba.training import held_out, loop
from moemamba.training.blocks import standard_error
from moemamba.training.config import read_run
from moemamba.training.evaluate import Evaluation, _cut
from moemamba.training.update import optimizer_of
from moemamba.training.update.guard import Diverged
from moemamba.training.update.schedule import learning_rate

SILENT = Report(silent=True)
EXPERTS = ExpertsConfig(4, capacity_factor=1.0, bias_rate=0.01)
TINY = ModelConfig("ME", 1, 16, experts=EXPERTS)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """A cache of tokens that is thrown away, and one thread, since these models are too small for two."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two modules of the standard library, which is text that can be learnt."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(os.__file__).parent
    for name in ("dataclasses.py", "argparse.py"):
        shutil.copy(library / name, folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, text):
    return TrainConfig(
        TINY,
        text,
        run=str(tmp_path / "run"),
        steps=10,
        batch_size=4,
        context=32,
        log_every=2,
        eval_every=5,
        eval_tokens=256,
        save_every=5,
    )


def lines(config, kind=None):
    with open(Path(config.run) / "metrics.jsonl") as stream:
        return [line for line in map(json.loads, stream) if kind in (None, line["kind"])]


def same_weights(one, other):
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


# The pieces


def test_learning_rate():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 44] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 44 / 89)) / 2)
    assert learning_rate(TrainConfig(steps=1, warmup=0.0), 0) == TrainConfig().learning_rate


def test_decay_groups():
    routed = RoutedMambaConfig(experts=ExpertsConfig(2))
    model = MoEMamba(ModelConfig("MEFAR", 1, 16, norm="layernorm", routed=routed, attention=AttentionConfig(2)))
    spared = {"A_log", "D", "bias", "norm"}
    optimizer = optimizer_of(model, TrainConfig(weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        assert decay[id(parameter)] == (0.0 if spared & set(name.split(".")) else 0.2), name
    assert {0.0, 0.2} == set(decay.values())
    (group,) = optimizer_of(model, TrainConfig(weight_decay=0.2, decay="all")).param_groups
    assert len(group["params"]) == len(names) and group["weight_decay"] == 0.2


def test_losses_apart():
    torch.manual_seed(0)
    config = ModelConfig("EM(ME)", 1, 16, experts=ExpertsConfig(4, balance_weight=0.5, z_weight=0.25))
    model = MoEMamba(config)
    tokens, targets = torch.randint(257, (2, 2, 9))
    output = model(tokens, targets=targets)
    language, auxiliary = output.loss, output.auxiliary
    expected = cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
    assert torch.allclose(language, expected)
    terms = [0.5 * stats.balance_loss + 0.25 * stats.z_loss for stats in output.router]
    assert len(terms) == 2 and torch.allclose(auxiliary, (terms[0] + terms[1]) / 2)
    dense = MoEMamba(ModelConfig("M", 1, 16))
    assert dense(tokens, targets=targets).auxiliary == 0


def test_evaluation_is_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model = MoEMamba(dataclasses.replace(TINY, vocab_size=257)).train()
    ids = np.random.default_rng(0).integers(0, 257, 120).astype(np.uint16)
    data = Tokens(ids, np.array([50, 120]), bytes=240)
    result = evaluate(model, data, context=20, batch_size=2)
    assert model.training
    model.eval()
    windows = torch.tensor(ids[:100].astype(np.int64)).view(5, 20)
    tail = torch.tensor(ids[100:119].astype(np.int64))[None]
    logits = torch.cat([model(windows).logits.flatten(0, 1), model(tail).logits[0]])
    expected = cross_entropy(logits, torch.tensor(ids[1:].astype(np.int64))).item()
    assert result.loss == pytest.approx(expected, rel=1e-5) and result.tokens == 119
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 2, rel=1e-5)
    assert result.drop_gap is None
    assert evaluate(model, data, context=20, batch_size=5).loss == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, data, context=20, most=40).tokens == 40
    reset = evaluate(model, data, context=20, reset_state=True).loss
    assert reset != pytest.approx(expected, rel=1e-6)


def test_accuracy_is_the_share_of_likeliest_tokens():
    torch.manual_seed(0)
    model = MoEMamba(dataclasses.replace(TINY, vocab_size=4)).eval()
    ids = np.random.default_rng(0).integers(0, 4, 121).astype(np.uint16)
    found = evaluate(model, Tokens(ids, np.array([121]), bytes=121), context=20, batch_size=4)
    likeliest = model(torch.tensor(ids[:120].astype(np.int64)).view(6, 20)).logits.argmax(-1).flatten()
    right = (likeliest == torch.tensor(ids[1:].astype(np.int64))).double().mean().item()
    assert 0 < right < 1 and found.accuracy == pytest.approx(right)


def test_drop_gap_is_what_capacity_costs():
    torch.manual_seed(0)
    model = MoEMamba(dataclasses.replace(TINY, experts=ExpertsConfig(4, capacity_factor=0.25)))
    data = Tokens(np.arange(193).astype(np.uint16), np.array([193]), bytes=192)
    gap = evaluate(model, data, context=32, drop_gap=True).drop_gap
    model.train()
    batch = torch.arange(192).view(6, 32)
    capped = model(batch, targets=batch + 1).loss
    assert gap == pytest.approx(capped.item() - model.eval()(batch, targets=batch + 1).loss.item(), abs=1e-5)
    assert abs(gap) > 1e-5


# The loop


def test_accumulation_equals_the_big_batch(config):
    dense = dataclasses.replace(config, model=ModelConfig("MF", 1, 16), steps=4, log_every=1, learning_rate=1e-3)
    whole = train(dense, report=SILENT)
    parts = dataclasses.replace(dense, accumulate=4, run=dense.run + "-parts")
    result = train(parts, report=SILENT)
    for one, other in zip(lines(dense, "train"), lines(parts, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for (name, value), other in zip(whole.model.state_dict().items(), result.model.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=2e-5), name


def test_accumulated_router_statistics_are_means(config):
    parts = dataclasses.replace(config, accumulate=4, steps=2)
    train(parts, report=SILENT)
    (line,) = lines(parts, "router")
    assert 0 < line["layers"][0]["entropy"] <= math.log(4) and 0.9 < line["layers"][0]["balance"] < 4


def test_loss_falls_on_real_text(tmp_path, text):
    model = ModelConfig("ME", 1, 32, experts=ExpertsConfig(4))
    config = TrainConfig(model, text, run=str(tmp_path / "run"), steps=80, batch_size=8, context=64, eval_every=80)
    result = train(config, report=SILENT)
    logged = lines(config, "train")
    assert logged[0]["loss"] > 4.0 and logged[-1]["loss"] < 2.9, logged
    assert result.evaluation.loss < 3.0 and result.evaluation.loss == lines(config, "evaluation")[-1]["loss"]


def test_metrics_say_what_happened(config):
    result = train(config, report=SILENT)
    assert [line["step"] for line in lines(config, "train")] == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines(config, "evaluation")] == [5, 10]
    last = lines(config, "train")[-1]
    assert last["tokens"] == 10 * 4 * 32 and last["loss"] == result.loss
    assert set(last) == {
        *("kind", "step", "tokens", "loss", "auxiliary", "learning_rate", "grad_norm", "tokens_per_second", "seconds")
    }
    assert not result.model.training
    assert {"loss", "perplexity", "bits_per_byte", "drop_gap", "seconds"} < set(lines(config, "evaluation")[0])
    (layer,) = lines(config, "router")[-1]["layers"]
    assert layer["name"] == "layers.1.branches.0" and layer["max_entropy"] == math.log(4)
    assert sum(layer["load"]) == pytest.approx(1, abs=1e-4) and layer["dead"] == 0 and 0 < layer["dropped"] < 1
    model, tokenizer = load(config.run)
    assert same_weights(model, result.model) and tokenizer.decode(tokenizer.encode("é")) == "é"
    saved = from_dict(TrainConfig, json.loads((Path(config.run) / "train.json").read_text()))
    assert to_dict(saved) == to_dict(dataclasses.replace(config, routing_groups=1))


def test_stopped_and_resumed_is_the_same_run(config):
    whole = train(config, report=SILENT)
    halves = dataclasses.replace(config, run=config.run + "-halves", reset_state=False)
    first = train(halves, stop=5, report=SILENT)
    assert first.step == 5
    second = train(halves, resume=True, report=SILENT)
    assert second.step == 10 and same_weights(second.model, whole.model)
    assert second.evaluation == whole.evaluation and second.loss == whole.loss

    def timeless(config):
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines(config)]

    assert timeless(halves) == timeless(config)
    again = train(halves, resume=True, report=SILENT)  # it has ended already
    assert again.step == 10 and again.evaluation == whole.evaluation and same_weights(again.model, whole.model)


def test_resuming_drops_what_was_not_saved(config):
    whole = train(config, report=SILENT)
    train(other := dataclasses.replace(config, run=config.run + "-other"), stop=8, report=SILENT)
    shutil.rmtree(Path(other.run) / "checkpoints" / "00000008")
    with open(Path(other.run) / "metrics.jsonl", "a") as stream:
        stream.write('{"kind": "train", "st')  # killed while writing
    resumed = train(other, resume=True, report=SILENT)
    assert same_weights(resumed.model, whole.model)
    assert [(line["kind"], line["step"]) for line in lines(other)] == [(x["kind"], x["step"]) for x in lines(config)]


def test_watching_changes_nothing(config):
    often = {"log_every": 1, "eval_every": 3, "eval_tokens": 64, "save_every": 4, "keep": 1}
    watched = dataclasses.replace(config, **often, run=config.run + "-often")
    assert same_weights(train(config, report=SILENT).model, train(watched, report=SILENT).model)


KILLED = """
import json, sys
from moemamba import TrainConfig, train
from moemamba.reading import from_dict
from moemamba.training.run import RunDirectory
config = from_dict(TrainConfig, json.loads(sys.argv[1]))
train(config, resume=RunDirectory(config.run).exists)
"""


def test_killed_at_any_moment(config):
    config = dataclasses.replace(config, steps=30, save_every=3, eval_every=10)
    expected = train(config, report=SILENT).model
    killed = dataclasses.replace(config, run=config.run + "-killed")
    command = [sys.executable, "-c", KILLED, json.dumps(to_dict(killed))]
    moments = random.Random(time.time_ns())
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        while not (Path(killed.run) / "checkpoints").exists() and time.monotonic() - start < 60:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for checkpoint in (Path(killed.run) / "checkpoints").glob("[0-9]*"):
            load(checkpoint)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    assert same_weights(load(killed.run)[0], expected)
    assert not list((Path(killed.run) / "checkpoints").glob(".*"))


def test_keeps_the_newest_and_the_best(config, monkeypatch):
    results = iter([5.0, 3.0, 4.0, 2.5, 4.0, 6.0, 5.0, 4.0])
    monkeypatch.setattr(held_out, "evaluate", lambda *a, **k: Evaluation(next(results), 0.0, 0.0, 0))
    config = dataclasses.replace(config, steps=8, save_every=1, eval_every=1, test="none")
    train(config, stop=3, report=SILENT)
    assert {int(folder.name) for folder in (Path(config.run) / "checkpoints").iterdir()} == {2, 3}
    train(config, resume=True, report=SILENT)
    assert {int(folder.name) for folder in (Path(config.run) / "checkpoints").iterdir()} == {4, 7, 8}


def test_keeps_no_more_without_evaluation(config):
    train(dataclasses.replace(config, save_every=1, eval_every=100), stop=6, report=SILENT)
    kept = sorted(folder.name for folder in (Path(config.run) / "checkpoints").iterdir())
    assert kept == ["00000005", "00000006"]


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(config, capsys):
    whole = train(config, report=SILENT)
    other = dataclasses.replace(config, run=config.run + "-other")
    for name in ("model.safetensors", "training.safetensors", "training.json"):
        shutil.rmtree(other.run, ignore_errors=True)
        train(other, report=SILENT)
        file = Path(other.run) / "checkpoints" / "00000010" / name
        file.write_bytes(file.read_bytes()[:-20])
        assert same_weights(train(other, resume=True).model, whole.model)
        said = capsys.readouterr().out
        assert f"00000010/{name} is damaged or incomplete" in said and "00000005 instead" in said
    for folder in (Path(other.run) / "checkpoints").glob("0*"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00000005.model\.safetensors is missing"):
        train(other, resume=True, report=SILENT)


# What can go wrong


def test_a_run_is_never_overwritten(config):
    train(config, stop=1, report=SILENT)
    before = sorted(Path(config.run).rglob("*"))
    with pytest.raises(FileExistsError, match="already holds a run; resume it"):
        train(config, report=SILENT)
    (Path(config.run) / "train.json").unlink()  # a new run's first checkpoints would go before the old ones
    with pytest.raises(FileExistsError, match=r"holds checkpoints, but not the train\.json"):
        train(config, report=SILENT)
    assert set(before) - set(Path(config.run).rglob("*")) == {Path(config.run) / "train.json"}


def test_two_processes_never_train_in_one_directory(config):
    pytest.importorskip("fcntl")
    train(config, stop=1, report=SILENT)
    leftover = Path(config.run) / "checkpoints" / ".00000002"
    script = "import sys; from moemamba.training.run import RunDirectory\n"
    script += "RunDirectory(sys.argv[1]).occupy(True); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, config.run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        leftover.mkdir()  # what the other one is writing
        with pytest.raises(OSError, match="another process trains in"):
            train(config, resume=True, report=SILENT)
        assert leftover.exists()
        other.kill()
    train(config, resume=True, stop=2, report=SILENT)
    assert not leftover.exists()


def test_a_run_needs_a_directory(config):
    with pytest.raises(ValueError, match="run names no directory"):
        train(dataclasses.replace(config, run=""), report=SILENT)


def test_nothing_to_resume(config):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(config, resume=True, report=SILENT)


def test_unwritable_run_directory(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to the run directory .*file.run: Not a directory"):
        train(dataclasses.replace(config, run=str(tmp_path / "file" / "run")), report=SILENT)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.1}, {"warmup": 0.2}, {"seed": 1}, {"model": TINY.replace(n_experts=8)}]
)
def test_resuming_with_another_configuration(config, change):
    train(config, stop=1, report=SILENT)
    name = "n_experts" if "model" in change else next(iter(change))
    with pytest.raises(ValueError, match=rf"{name} is .* began with .*"):
        train(dataclasses.replace(config, **change), resume=True, report=SILENT)


def test_resuming_with_other_data(config, tmp_path):
    shutil.copytree(config.data, tmp_path / "data")
    config = dataclasses.replace(config, data=str(tmp_path / "data"))
    train(config, stop=1, report=SILENT)
    moved = dataclasses.replace(config, data=str((tmp_path / "data").rename(tmp_path / "moved")), keep=5)
    train(moved, resume=True, stop=2, report=SILENT)
    (tmp_path / "moved" / "new.py").write_text("x = 1\n" * 1000)
    with pytest.raises(ValueError, match=r"training data of .* has changed"):
        train(moved, resume=True, report=SILENT)


def test_diverging_loss_stops_the_run(config, monkeypatch):
    config = dataclasses.replace(config, steps=20, save_every=2, log_every=5, eval_every=100)
    forward = MoEMamba.forward
    calls = iter(range(1000))

    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output._replace(loss=output.loss * (math.nan if next(calls) == 6 else 1))

    monkeypatch.setattr(MoEMamba, "forward", poisoned)
    with pytest.raises(Diverged, match=r"not finite at step 7; .*metrics.jsonl.*learning_rate"):
        train(config, report=SILENT)
    failure = lines(config)[-1]
    assert failure["kind"] == "failure" and failure["step"] == 7 and len(failure["windows"]) == 4
    model, _ = load(config.run)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert sorted(p.name for p in (Path(config.run) / "checkpoints").iterdir()) == ["00000004", "00000006"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "there is no text in"), ("short text", "has 11 tokens, but one window needs 33"), (b"\xff", "is not UTF-8")],
)
def test_text_that_cannot_be_trained_on(config, tmp_path, content, said):
    (tmp_path / "t.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        train(dataclasses.replace(config, data=str(tmp_path / "t.txt")), report=SILENT)
    train(dataclasses.replace(config, steps=1), report=SILENT)  # nothing stands in the way of another try


def test_too_little_to_hold_out(config, tmp_path):
    (tmp_path / "v.txt").write_text("short")
    with pytest.raises(ValueError, match=r"the held-out text of .* has 6 tokens, but one window needs 33"):
        train(dataclasses.replace(config, validation=str(tmp_path / "v.txt")), report=SILENT)
    (tmp_path / "line.txt").write_text("word " * 20)
    with pytest.raises(ValueError, match=r"has 0 tokens.*held-out text of its own \(validation\)"):
        train(dataclasses.replace(config, data=str(tmp_path / "line.txt")), report=SILENT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"accumulate": 3}, "accumulate is 3, which does not divide batch_size = 16"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"data_seed": 1 << 64}, "expected a number below 2"),
        ({"learning_rte": 1.0}, "unknown key 'learning_rte'"),
        ({"model": {"d_model": -8}}, "d_model is -8"),
    ],
)
def test_configuration_errors(change, said):
    with pytest.raises(ValueError, match=said):
        from_dict(TrainConfig, change)


def test_unknown_device(config):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        train(dataclasses.replace(config, device="gpu"), report=SILENT)


# Choices


def test_bfloat16_keeps_float32_weights(config):
    result = train(dataclasses.replace(config, dtype="bfloat16"), report=SILENT)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    exact = train(dataclasses.replace(config, run=config.run + "-exact"), report=SILENT)
    assert result.loss != exact.loss and result.loss == pytest.approx(exact.loss, abs=0.02)


def test_recompute_changes_nothing(config):
    plain = train(config, report=SILENT)
    less = train(dataclasses.replace(config, recompute=True, run=config.run + "-less"), report=SILENT)
    assert less.loss == pytest.approx(plain.loss, rel=1e-5) and less.model.recompute


def test_reset_state_changes_the_loss(config, tmp_path):
    (tmp_path / "short.jsonl").write_text("\n".join(f'{{"text": "number {k}"}}' for k in range(2000)))
    config = dataclasses.replace(config, data=str(tmp_path / "short.jsonl"))
    plain = train(config, report=SILENT)
    reset = train(dataclasses.replace(config, reset_state=True, run=config.run + "-reset"), report=SILENT)
    assert reset.loss != plain.loss and reset.loss == pytest.approx(plain.loss, abs=0.3)


def test_own_tokenizer(config):
    result = train(dataclasses.replace(config, tokenizer="bpe-300", steps=2), report=SILENT)
    assert result.model.config.vocab_size <= 300
    assert load(config.run)[1].encode("self.parser") != list(b"self.parser")
    assert train(dataclasses.replace(config, tokenizer="bpe-300", steps=2), resume=True, report=SILENT).step == 2


def test_plain_lines_without_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0.0)
    train(config, report=Report("name"))
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("name: ") for line in said)
    text = "\n".join(said)
    for part in (
        "documents",
        "tokens",
        "ME x 1",
        "active",
        "cpu, float32",
        config.run,
        "step 10: held-out loss",
        "step 8 of 10: loss ",
        " tokens/s, 0:00:00 left",
    ):
        assert part in text


def test_public_names():
    assert moemamba.train is train and moemamba.evaluate is evaluate and moemamba.TrainConfig is TrainConfig


def test_a_finished_run_is_tested_on_text_that_it_was_not_evaluated_on(config):
    """Every second window, all of them, once; against a plain loop over the same tokens."""
    found = train(dataclasses.replace(config, eval_tokens=1 << 20), report=SILENT)
    corpora = loop.open_corpora(config.reads(), ByteTokenizer(), SILENT)
    (held,), (own,) = corpora.validation, corpora.test
    assert (held.half, own.half) == (0, 1)
    model, ids = load(config.run)[0], torch.from_numpy(own.tokens.ids.astype(np.int64))
    total = {0: 0.0, 1: 0.0}
    count = {0: 0, 1: 0}
    for number, first in enumerate(range(0, len(ids) - 1, 32)):
        row = ids[first : first + 33]
        with torch.no_grad():
            loss = cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum")
        total[number % 2] += loss.item()
        count[number % 2] += len(row) - 1
    assert (found.evaluation.tokens, found.test.tokens) == (count[0], count[1])
    assert found.evaluation.loss == pytest.approx(total[0] / count[0], abs=1e-5)
    assert found.test.loss == pytest.approx(total[1] / count[1], abs=1e-5)
    (line,) = lines(config, "test")
    assert line["step"] == config.steps and line["loss"] == found.test.loss and line["tokens"] == count[1]
    blocks = np.array(line["blocks"])
    assert blocks[:, 0].sum() == pytest.approx(1) and blocks.prod(1).sum() == pytest.approx(line["loss"])
    again = train(config, resume=True, report=SILENT)
    assert again.test is None and lines(config, "test") == [line]


def test_a_test_that_was_cut_off_is_made_up_for(config):
    train(config, report=SILENT)
    (line,) = lines(config, "test")
    log = Path(config.run) / "metrics.jsonl"
    log.write_text("".join(text for text in log.read_text().splitlines(True) if '"kind": "test"' not in text))
    assert train(config, resume=True, report=SILENT).test.loss == line["loss"]
    assert lines(config, "test") == [line]


def test_a_run_of_an_older_version_has_no_test(config):
    train(config, stop=5, report=SILENT)
    file = Path(config.run) / "train.json"
    values = json.loads(file.read_text())
    del values["test"]
    file.write_text(json.dumps(values))
    train(read_run(file), resume=True, report=SILENT)
    assert not lines(config, "test")


def test_a_text_to_test_on(config, tmp_path):
    """Of its own, so that the held-out text is evaluated on as a whole."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"line {k}\n" for k in range(40)))
    config = dataclasses.replace(config, test=str(other))
    found = train(config, report=SILENT)
    assert found.test.tokens == len(other.read_text())  # and the end mark, all but the first
    assert loop.open_corpora(config.reads(), ByteTokenizer(), SILENT).validation[0].half is None


def test_the_standard_error_is_that_of_the_blocks():
    values = [3.0, 4.0, 5.0, 4.5]
    expected = np.std(values, ddof=1) / 2
    assert standard_error([(0.25, value) for value in values]) == pytest.approx(expected)
    assert standard_error([(1.0, 3.0)]) is None


@pytest.mark.parametrize(("total", "blocks", "rows"), [(10, 3, 4), (7, 7, 2), (5, 64, 5), (100, 8, 33), (6, 1, 4)])
def test_windows_are_cut_into_blocks_of_one_size(total, blocks, rows):
    found = []
    for first in range(0, total, rows):
        for block, part in _cut(first, min(rows, total - first), total, blocks):
            found += [block] * (part.stop - part.start)
    assert found == [window * blocks // total for window in range(total)]
