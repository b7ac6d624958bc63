"""Runs that look after themselves: signals, withheld updates, alarms, schedules, Muon, TensorBoard."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moemamba import MoEMamba, TrainConfig, load, ops, train
from moemamba.config import ExpertsConfig, ModelConfig
from moemamba.distributed import Processes, gradient_norm
from moemamba.host import stop
from moemamba.host.progress import Report
from moemamba.host.stop import Stop
from moemamba.layers import roles
from moemamba.reading import from_dict, to_dict
from moemamba.training.update import muon, optimizer_of
from moemamba.training.update import step as stepping
from moemamba.training.update.guard import Diverged, Fatal, Guard, Skips, apply
from moemamba.training.update.muon import MOMENTUM, RMS, Muon, orthogonal
from moemamba.training.update.schedule import learning_rate
from moemamba.training.watch.alarms import DEAD_AFTER, Alarms, Raised, sentences

SILENT = Report(silent=True)
TINY = ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, d_expert=16))


@pytest.fixture(autouse=True, scope="module")
def small_work():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.backend("reference"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(3000)))
    small = {"steps": 12, "batch_size": 2, "context": 16, "log_every": 2, "eval_every": 6, "eval_tokens": 64}
    return TrainConfig(model=TINY, data=str(text), run=str(tmp_path / "run"), save_every=4, **small)


def lines(config, kind):
    every = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_begin_peak_and_end(schedule):
    config = TrainConfig(steps=100, warmup=0.1, cooldown=0.3, final_lr=0.1, learning_rate=2.0, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    level = sum(rate == pytest.approx(2.0) for rate in rates)
    middle = {"cosine": 1.1, "linear": 1.1}
    if schedule == "wsd":
        assert level == 61 and rates[70] < 2.0 - 0.2  # the square root falls fast at first
        assert rates[69 + 15] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(0.5)), rel=0.02)
    else:
        assert rates[10 + 45] == pytest.approx(middle[schedule], rel=0.03)


# Muon


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8), (3, 8, 20)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(*shape) * 7))
        assert values.min() > 0.6 and values.max() < 1.3


def test_a_stack_of_matrices_is_its_matrices():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    torch.testing.assert_close(orthogonal(stack), torch.stack([orthogonal(matrix) for matrix in stack]))


@pytest.mark.parametrize("together", [muon.TOGETHER, 120, 1])
def test_muon_follows_its_formula_and_leaves_the_rest_to_adamw(together, monkeypatch):
    """Several matrices of one shape take their step together, as they would alone."""
    monkeypatch.setattr(muon, "TOGETHER", together)
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 10), (6, 10), (10, 6), (6, 10), (2, 6, 10)]]
    vector = torch.nn.Parameter(torch.randn(5))
    twin = torch.nn.Parameter(vector.detach().clone())
    groups = [{"params": matrices, "muon": True, "weight_decay": 0.5}, {"params": [vector], "weight_decay": 0.0}]
    optimizer, adamw = Muon(groups, lr=0.1, fused=True), torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0, fused=True)
    expected = [matrix.detach().clone() for matrix in matrices]
    momenta = [torch.zeros_like(matrix) for matrix in expected]
    for _ in range(3):
        for k, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape)
            momenta[k] = MOMENTUM * momenta[k] + (1 - MOMENTUM) * matrix.grad
            nesterov = (1 - MOMENTUM) * matrix.grad + MOMENTUM * momenta[k]
            expected[k] = expected[k] * (1 - 0.1 * 0.5) - 0.1 * RMS * math.sqrt(10) * orthogonal(nesterov)
        vector.grad = torch.randn(5)
        twin.grad = vector.grad.clone()
        optimizer.step()
        adamw.step()
    for k, matrix in enumerate(matrices):
        torch.testing.assert_close(matrix.detach(), expected[k])
        torch.testing.assert_close(optimizer.state[matrix]["momentum_buffer"], momenta[k])
    assert torch.equal(vector, twin)


def test_muon_takes_matrices_between_hidden_layers_alone():
    model = MoEMamba(TINY)
    taken = {name for name, role in roles(model).items() if role.muon}
    assert taken and all(any(part in name for part in ("proj", "up", "down")) for name in taken)
    assert {parameter.ndim for name, parameter in model.named_parameters() if name in taken} == {2, 3}
    optimizer = optimizer_of(model, TrainConfig(model=TINY, optimizer="muon"))
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(model.parameters()))


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"schedule": "wsd"}, {"on_failure": "skip"}])
def test_resumption_is_exact(config, changes, tmp_path):
    config = dataclasses.replace(config, spike_factor=50.0, **changes)
    whole = train(config, report=SILENT)
    parted = dataclasses.replace(config, run=str(tmp_path / "parted"))
    train(parted, stop=5, report=SILENT)
    again = train(parted, "auto", report=SILENT)
    assert same_weights(whole.model, again.model)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_within_the_update_is_clipping_before_it(clip, kind, fused, device):
    torch.manual_seed(0)
    models = [torch.nn.Linear(30, 50).to(device)]
    models.append(copy.deepcopy(models[0]))
    ours, theirs = (
        kind([{"params": [each.weight], "muon": kind is Muon}, {"params": [each.bias]}], lr=0.01, fused=fused)
        for each in models
    )
    for _ in range(3):
        for parameter, same in zip(*(each.parameters() for each in models), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        norm = gradient_norm(models[0].parameters(), Processes(torch.device(device)))
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(models[1].parameters(), clip))
        apply(ours, torch.tensor(False, device=device), (norm / clip).clamp(min=1.0))
        theirs.step()
    for parameter, same in zip(*(each.parameters() for each in models), strict=True):
        torch.testing.assert_close(parameter, same)


# Updates that are withheld


def poison(monkeypatch, *steps):
    """Losses of these steps (the first is 1) are not a number."""
    original, calls = stepping.losses, iter(range(1, 10**6))

    def poisoned(output):
        language, auxiliary = original(output)
        return language * math.nan if next(calls) in steps else language, auxiliary

    monkeypatch.setattr(stepping, "losses", poisoned)


def test_a_failed_step_is_skipped_and_written_down(config, monkeypatch):
    poison(monkeypatch, 3, 8)
    result = train(dataclasses.replace(config, on_failure="skip"), report=SILENT)
    assert result.step == 12 and all(parameter.isfinite().all() for parameter in result.model.parameters())
    assert [line["step"] for line in lines(config, "skip")] == [3, 8]
    assert all(len(line["windows"]) == 2 for line in lines(config, "skip"))
    assert [line.get("skipped", 0) for line in lines(config, "train")] == [0, 1, 0, 1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines(config, "train"))


def test_a_skipped_step_changes_nothing():
    """Weights, decay, moments and their count stay as if the step had not been, for AdamW and Muon."""
    for kind in ("adamw", "muon"):
        torch.manual_seed(0)
        model = MoEMamba(TINY)
        optimizer = optimizer_of(model, TrainConfig(model=TINY, optimizer=kind))
        tokens = torch.randint(0, 257, (2, 9))
        for failed in (False, True, False):
            model(tokens, targets=tokens).loss.backward()
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            states = {k: v.clone() for state in optimizer.state.values() for k, v in state.items()}
            if failed:
                for parameter in model.parameters():
                    parameter.grad.fill_(math.nan)
            apply(optimizer, torch.tensor(failed), torch.tensor(3.0))
            same = [torch.equal(before[name], parameter) for name, parameter in model.named_parameters()]
            assert all(same) if failed else not any(same), kind
            if failed:
                after = {k: v for state in optimizer.state.values() for k, v in state.items()}
                assert all(torch.equal(states[k], after[k]) for k in states), kind
            optimizer.zero_grad()


def test_failures_in_a_row_stop_the_run(config, monkeypatch):
    poison(monkeypatch, *range(6, 13))
    with pytest.raises(Diverged, match="not finite at step 8, failure 3 in a row"):
        train(dataclasses.replace(config, on_failure="skip", max_skips=3), report=SILENT)
    assert [line["step"] for line in lines(config, "skip")] == [6, 7]
    assert lines(config, "failure")[0]["step"] == 8
    load(config.run)


def test_a_spike_is_a_gradient_far_above_the_median():
    config = TrainConfig(on_failure="skip", spike_factor=5.0)
    guard = Guard(config, torch.device("cpu"), Skips())
    norms = [1.0] * 19 + [100.0] + [1.0] * 5 + [6.0, 4.9]
    failed = [bool(guard.check(torch.tensor(2.0), torch.tensor(norm))) for norm in norms]
    assert [k for k, what in enumerate(failed) if what] == [25]  # the 20th is no spike yet: too little is known
    resumed = Guard(config, torch.device("cpu"), guard.state())
    for norm in (6.0, 4.0):
        assert torch.equal(
            guard.check(torch.tensor(1.0), torch.tensor(norm)),
            resumed.check(torch.tensor(1.0), torch.tensor(norm)),
        )


def test_a_guard_that_stops_says_where():
    guard = Guard(TrainConfig(), torch.device("cpu"), Skips())
    loss, norm = torch.tensor(math.inf), torch.tensor(1.0)
    guard.note(7, loss, norm, guard.check(loss, norm))
    with pytest.raises(Fatal, match="not finite at step 7"):
        guard.read()


# Alarms


def layer(load, entropy=1.0):
    return [{"name": "layers.1", "load": load, "entropy": entropy, "max_entropy": math.log(len(load))}]


def test_alarms_are_raised_once_and_again_after_they_ended():
    alarms = Alarms([1])
    even, full = [0.25] * 4, [0.94, 0.02, 0.02, 0.02]
    assert alarms.look(layer(even), 10) == []
    (raised,) = alarms.look(layer(full), 10)
    assert raised["alarm"] == "collapsed" and raised["expert"] == 0
    assert alarms.look(layer(full), 10) == []
    resumed = Alarms([1], from_dict(Raised, json.loads(json.dumps(to_dict(alarms.state())))))
    assert resumed.look(layer(full), 10) == []
    assert resumed.look(layer(even), 10) == []
    assert [alarm["alarm"] for alarm in resumed.look(layer(full, 0.001), 10)] == ["collapsed", "certain"]
    assert "layers.1 (expert 0, 94%)" in sentences(5, [raised])[0]


def test_dead_experts_are_those_without_a_token_for_long():
    alarms = Alarms([1])
    load = [0.5, 0.5, 0.0, 0.0]
    assert alarms.look(layer(load), DEAD_AFTER - 1) == []
    (raised,) = alarms.look(layer(load), 1)
    assert raised["experts"] == [2, 3]
    assert alarms.look(layer(load), 50) == []
    assert alarms.look(layer([0.4, 0.4, 0.1, 0.1]), 50) == []
    assert alarms.look(layer(load), DEAD_AFTER)[0]["alarm"] == "dead"


# Signals


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_saves_and_says_how_to_go_on(config, tmp_path, number, status):
    whole = train(config, report=SILENT)
    run = tmp_path / "stopped"
    script = (
        "import sys, time; from moemamba.training.update import Step; take = Step.__call__\n"
        "def slow(*arguments): time.sleep(0.05); return take(*arguments)\n"
        "Step.__call__ = slow\n"
        "from moemamba import ops; ops.backend('reference'); from moemamba.cli import main; main()"
    )
    options = ["train", "--data", str(config.data), "--run", str(run), "--steps", "12", "--batch-size", "2"]
    options += ["--context", "16", "--log-every", "2", "--eval-every", "6", "--eval-tokens", "64", "--save-every", "4"]
    model = ["--model.pattern", "ME", "--model.n-blocks", "1", "--model.d-model", "16"]
    model += ["--model.experts.n-experts", "4", "--model.experts.d-expert", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *options, *model], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (run / "metrics.jsonl").exists() or '"train"' not in (run / "metrics.jsonl").read_text():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    assert f"--run {run} --resume" in said and "is saved" in said
    saved = max(int(folder.name) for folder in (run / "checkpoints").iterdir())
    assert 2 <= saved < 12
    resumed = train(dataclasses.replace(config, run=str(run)), "auto", report=SILENT)
    assert same_weights(resumed.model, whole.model)


# TensorBoard


def test_tensorboard_has_the_same_figures(config):
    pytest.importorskip("tensorboard")
    train(dataclasses.replace(config, tensorboard=True), report=SILENT)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(Path(config.run) / "tensorboard"))
    found.Reload()
    assert [(event.step, round(event.value, 4)) for event in found.Scalars("train/loss")] == [
        (line["step"], round(line["loss"], 4)) for line in lines(config, "train")
    ]


def test_tensorboard_that_is_not_there(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'moemamba\[tensorboard\]'"):
        train(dataclasses.replace(config, tensorboard=True), report=SILENT)
    assert not Path(config.run).exists()  # nothing stands in the way of another try


def test_a_signal_that_comes_by_two_ways_is_one(monkeypatch):
    """Of a scheduler and of torchrun; later, or from a person, a second one ends the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt), Stop() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    monkeypatch.setattr(stop, "SAME", 0.0)
    with Stop():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
