"""Several processes are one: the same losses, gradients and weights for every sharding, and checkpoints for all."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from groups import enter, start

from moemamba import ModelConfig, MoEMamba, TrainConfig, load, train
from moemamba.config import ExpertsConfig, RoutedMambaConfig
from moemamba.distributed import Processes, divide_gradients, gathered, gradient_norm, join, summing
from moemamba.host.progress import Report
from moemamba.training.spread import build, check

pytestmark = pytest.mark.slow
SILENT = Report(silent=True)
EXPERTS = ExpertsConfig(4, bias_rate=0.01)
MODEL = ModelConfig("MER", 1, 16, experts=EXPERTS, routed=RoutedMambaConfig(experts=ExpertsConfig(4)))
DIFFERENT = MODEL.replace(n_blocks=2, n_experts=(2, 6))  # of each layer another number of experts
FULL = MODEL.replace(experts=dataclasses.replace(EXPERTS, capacity_factor=0.7))
# Ways of sharing out the work, each against one process: processes, then what differs.
WAYS = {
    "copies": (2, {}),
    "parameters": (2, {"shard": "parameters"}),
    "averaged": (2, {"shard": "parameters", "average": 0.9}),
    "experts": (2, {"expert_parallel": 2}),
    "groups-over-processes": (2, {"routing_groups": 1, "model": FULL}),
    "muon": (2, {"shard": "parameters", "expert_parallel": 2, "optimizer": "muon", "model": DIFFERENT}),
    "parts-of-sequences": (2, {"sequence_parallel": 2, "model": FULL, "recompute": True}),
    "both-of-4": (4, {"shard": "parameters", "expert_parallel": 2, "model": FULL}),
    "copies-of-experts": (4, {"expert_parallel": 2, "accumulate": 2}),
    "parts-of-4": (
        4,
        {"sequence_parallel": 2, "accumulate": 2, "model": FULL, "reset_state": True},
    ),
    "tied": (4, {"shard": "parameters", "model": MODEL.replace(tie_embeddings=True, init="paper")}),
}
SPREADING = ("shard", "expert_parallel", "sequence_parallel", "accumulate", "recompute")
KILLS = int(os.environ.get("MOEMAMBA_KILLS", "2"))


UNEVEN = TrainConfig(MODEL, batch_size=8, routing_groups=4)
SAME = [{"recompute": True}, {"compile": True}, {"recompute": True, "compile": True}]


def work(rank, size, folder, cache, jobs):
    """Train one configuration after the other; then one gradient for each sharding, and what must not change it."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    enter(rank, size, folder / f"store-{size}")
    for config, resume, stop in jobs:
        train(config, resume, stop=stop, report=SILENT)
    for shard in ("none", "parameters"):
        for spread in sorted({1, 2, size}):
            config = dataclasses.replace(UNEVEN, shard=shard, expert_parallel=spread)
            found = [gradients(config, rank, size)]
            if size == 2:
                changes = SAME[:2] if spread > 1 else SAME  # see `spread.check`
                found += [gradients(dataclasses.replace(config, **change), rank, size) for change in changes]
            if rank == 0:
                torch.save(found, folder / f"{size}-{shard}-{spread}.pt")
    dist.destroy_process_group()


def go_on(rank, size, store, cache, config):
    """Train a run from where it stands."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    enter(rank, size, store)
    train(config, "auto", report=SILENT)
    dist.destroy_process_group()


def gradients(config, rank=0, size=1, distributed=True):
    """Of one batch in which experts 1 and 3 of the first router see no token, and a row counts only in part."""
    processes = Processes(torch.device("cpu"), rank, size, distributed)
    model = build(config, processes, torch.float32)
    model.layers[1].branches[0].router.balance_bias.copy_(torch.tensor([1.0, -9.0, 1.0, -9.0]))
    tokens, targets = torch.randint(257, (2, 8, 16), generator=torch.Generator().manual_seed(1))
    targets[0, 3:] = -100
    rows = slice(rank * 8 // size, (rank + 1) * 8 // size)
    if config.compile:
        torch.compiler.reset()
        model.compile_layers(backend="aot_eager")  # what training does, but for the C++ compiler
    forward = summing(model, processes)
    output = forward(tokens[rows], targets=targets[rows])
    language, auxiliary = output.loss, output.auxiliary
    share = (targets[rows] != -100).sum() / (targets != -100).sum()
    (language * share + auxiliary / size).backward()
    found = {name: gathered(parameter.grad).clone() for name, parameter in model.named_parameters()}
    norm = gradient_norm(model.parameters(), processes)
    divide_gradients(model.parameters(), norm / 0.01)
    clipped = {name: gathered(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return found, norm, clipped


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What all runs here share."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "text.txt").write_text(Path(dataclasses.__file__).read_text())
    often = {"log_every": 1, "eval_every": 10, "eval_tokens": 160, "save_every": 5}
    return TrainConfig(
        MODEL,
        str(folder / "text.txt"),
        steps=20,
        batch_size=8,
        context=16,
        routing_groups=4,
        learning_rate=1e-3,
        **often,
    )


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs of two and of four processes: the folder of all."""
    folder, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")
    saved = dataclasses.replace(base, run=str(folder / "saved"), shard="parameters", expert_parallel=2, model=FULL)
    for size in (2, 4):
        jobs = [
            (dataclasses.replace(base, run=str(folder / name), **change), False, None)
            for name, (processes, change) in WAYS.items()
            if processes == size
        ]
        if size == 2:
            jobs += [(saved, False, 10), (dataclasses.replace(saved, run=str(folder / "whole")), False, None)]
            halves = dataclasses.replace(saved, run=str(folder / "halves"))
            jobs += [(halves, False, 10), (halves, True, None)]
            jobs.append((dataclasses.replace(killed(base), run=str(folder / "never-killed")), False, None))
        else:
            copy(folder / "saved", folder / "on-4")
            jobs.append((dataclasses.replace(saved, run=str(folder / "on-4")), True, None))
        start(size, work, folder, cache, jobs)
    return folder


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The run that one process makes of a configuration: its folder."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(**change):
        key = repr(sorted(change.items()))
        if key not in made:
            made[key] = folder / str(len(made))
            train(dataclasses.replace(base, run=str(made[key]), **change), report=SILENT)
        return made[key]

    return run


def killed(base):
    """The run that is killed again and again; 60 steps for two kills, more for more."""
    steps = max(60, 10 * KILLS)
    return dataclasses.replace(base, steps=steps, save_every=3, shard="parameters", expert_parallel=2, model=FULL)


def copy(run, place):
    subprocess.run(["cp", "-r", run, place], check=True)


def lines(run, kind="train"):
    found = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def assert_alike(one, other, gap=True):
    """Two runs, up to rounding; `gap` False where a routing group is too large for one process to evaluate."""
    assert len(lines(one)) == len(lines(other)) == 20
    for mine, its in zip(lines(one), lines(other), strict=True):
        for name in ("loss", "auxiliary", "grad_norm"):
            assert mine[name] == pytest.approx(its[name], rel=2e-4), (mine["step"], name)
    for mine, its in zip(lines(one, "evaluation"), lines(other, "evaluation"), strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4) and mine["tokens"] == its["tokens"]
        assert mine["averaged"] == (its["averaged"] and pytest.approx(its["averaged"], rel=1e-4))
        assert (mine["drop_gap"] is None) == (its["drop_gap"] is None)
        if gap and mine["drop_gap"] is not None:
            assert mine["drop_gap"] == pytest.approx(its["drop_gap"], abs=1e-4)
    for mine, its in zip(lines(one, "router"), lines(other, "router"), strict=True):
        for a, b in zip(mine["layers"], its["layers"], strict=True):
            assert a["load"] == pytest.approx(b["load"], abs=0.01)
            assert a["dropped"] == pytest.approx(b["dropped"], abs=0.01)


def tensors(run):
    return load(run)[0].state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_are_one(way, runs, alone):
    _, change = WAYS[way]
    one = alone(**{name: change[name] for name in change if name not in SPREADING})
    assert_alike(runs / way, one, gap=way != "groups-over-processes")
    if "average" in change:
        for name, value in tensors(one / "averaged").items():
            torch.testing.assert_close(tensors(runs / way / "averaged")[name], value, rtol=1e-3, atol=2e-5)
    if "dropped" in str(change.get("model")):
        assert lines(runs / way, "router")[-1]["layers"][0]["dropped"] > 0.05
    first, last = tensors(one), tensors(runs / way)
    assert list(first) == list(last)
    for name, value in first.items():
        torch.testing.assert_close(last[name], value, atol=5e-4, rtol=0, msg=name)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients(size, runs):
    """Of every sharding; with two processes also compiled, recomputed, and both."""
    expected, norm, clipped = gradients(UNEVEN, distributed=False)
    experts = expected["layers.1.branches.0.experts.up_proj"]
    assert experts[0].any() and not experts[1].any() and not experts[3].any()
    for shard in ("none", "parameters"):
        for spread in {1, 2, size}:
            for found, its_norm, its_clipped in torch.load(runs / f"{size}-{shard}-{spread}.pt"):
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(its_clipped, clipped, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(its_norm, norm)


def test_resumed_with_the_same_processes_is_the_same_run(runs):
    assert all(torch.equal(value, tensors(runs / "whole")[name]) for name, value in tensors(runs / "halves").items())
    assert [line["loss"] for line in lines(runs / "halves")] == [line["loss"] for line in lines(runs / "whole")]


def test_saved_by_two_resumed_by_one_and_by_four(runs, base):
    assert_alike(runs / "on-4", runs / "whole")
    copy(runs / "saved", runs / "on-1")
    train(dataclasses.replace(base, run=str(runs / "on-1"), model=FULL), resume=True, report=SILENT)
    assert_alike(runs / "on-1", runs / "whole")


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_are_the_whole_batch(accumulate, alone):
    """With routing groups, auxiliary losses and capacity included."""
    assert_alike(alone(model=FULL), alone(model=FULL, accumulate=accumulate))


def test_groups_are_batches_of_their_own():
    torch.manual_seed(0)
    model = MoEMamba(FULL).train()
    tokens = torch.randint(257, (4, 16))
    apart = [model(rows).router[0] for rows in tokens.split(2)]
    for router in (module for module in model.modules() if hasattr(module, "across")):
        router.groups = 2
    together = model(tokens).router[0]
    for name in ("balance_loss", "z_loss", "dropped", "entropy"):
        mean = (getattr(apart[0], name) + getattr(apart[1], name)) / 2
        torch.testing.assert_close(getattr(together, name), mean)
    torch.testing.assert_close(together.load, apart[0].load + apart[1].load)
    assert together.dropped > 0


@pytest.mark.parametrize(
    ("change", "size", "said"),
    [
        ({"batch_size": 6}, 4, "batch_size is 6, which 4 processes times accumulate = 1 do not divide"),
        ({"expert_parallel": 3}, 4, "expert_parallel is 3, which does not divide the 4 processes"),
        ({"expert_parallel": 8, "batch_size": 8}, 8, "n_experts is 4, which expert_parallel = 8 does not divide"),
        ({"expert_parallel": 2, "model": ModelConfig("M", 1, 16)}, 2, "the model has no experts"),
        ({"expert_parallel": 2, "compile": True, "recompute": True}, 2, "compile and recompute do not go together"),
        ({"sequence_parallel": 3}, 4, "sequence_parallel is 3, which does not divide the 4 processes"),
        ({"sequence_parallel": 2, "expert_parallel": 2}, 2, "have all parameters, but expert_parallel is 2"),
        ({"sequence_parallel": 2, "context": 9}, 2, "context is 9, which sequence_parallel = 2 does not divide"),
        ({"sequence_parallel": 2, "shard": "parameters"}, 2, "have all parameters, but shard is"),
        (
            {"sequence_parallel": 2, "routing_groups": 1},
            4,
            "routing_groups is 1, which gives 1 .*; with sequence_parallel = 2 choose a multiple of 2",
        ),
        ({"sequence_parallel": 2, "batch_size": 3}, 4, "batch_size is 3, which 4 processes by 2 times accumulate"),
        ({"routing_groups": 3, "batch_size": 12}, 2, "routing_groups is 3, which gives 3 .* and 2 processes"),
    ],
)
def test_impossible_combinations(change, size, said):
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(TrainConfig(MODEL), **change), size)


def test_one_process_resumes_what_several_began():
    check(TrainConfig(MODEL, expert_parallel=2, sequence_parallel=2), 1)


def test_what_travels_in_bfloat16():
    """Matrices do; routers and what the scan reads stay float32, as do all master weights."""
    if dist.is_initialized():
        pytest.skip("there is a process group already")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        processes = Processes(torch.device("cpu"), 0, 1, True)
        model = build(TrainConfig(MODEL, shard="parameters"), processes, torch.bfloat16)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        model.unshard()
        for module in model.modules():
            if hasattr(module, "unshard"):
                module.unshard()
        narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
        assert {name.rsplit(".", 1)[-1] for name in narrow} == {"weight", "up_proj", "down_proj"}
        exact = ("router", "dt_proj", "conv1d", "norm", "embedding", "A_log", "D", "bias")
        assert not [name for name in narrow if set(name.split(".")) & set(exact)]
        assert {"head.weight", "layers.0.branches.0.in_proj.weight", "layers.1.branches.0.experts.up_proj"} <= narrow
    finally:
        dist.destroy_process_group()


def test_groups_smaller_than_parts():
    with pytest.raises(ValueError, match="routing_groups is 2; it must divide batch_size = 16 and be a multiple of"):
        TrainConfig(accumulate=4, routing_groups=2)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("moemamba.distributed.processes.find_device", lambda name: torch.device("cuda"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own"), join("auto"):
        pass


def test_an_error_of_writing_surfaces(base, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("moemamba.training.run.saving.write_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        train(dataclasses.replace(base, run=str(tmp_path / "run")), report=SILENT)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_killed_at_any_moment(base, runs, tmp_path):
    """One process of two is killed without warning, the other ends of itself or is ended; then two others go on."""
    config = dataclasses.replace(killed(base), run=str(tmp_path / "run"))
    moments = random.Random(time.time_ns())
    checkpoints = tmp_path / "run" / "checkpoints"
    kills = 0
    while not (ended := newest(checkpoints) == f"{config.steps:08d}") and kills < KILLS:
        before = newest(checkpoints)
        group = start(2, go_on, tmp_path / f"store-{kills}", tmp_path / "cache", config, join=False)
        while newest(checkpoints) == before:
            assert not group.join(timeout=0.01), "until it saves, so that every attempt gets somewhere"
        time.sleep(moments.uniform(0, 0.3))
        os.kill(moments.choice(group.pids()), signal.SIGKILL)
        kills += 1
        with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
            while not group.join(grace_period=10):
                pass
        for checkpoint in checkpoints.glob("[0-9]*"):
            load(checkpoint)
    if not ended:
        start(2, go_on, tmp_path / "store-last", tmp_path / "cache", config)
    assert kills
    expected = tensors(runs / "never-killed")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "run").items())
    assert not list(checkpoints.glob(".*"))


def newest(checkpoints):
    return max((path.name for path in checkpoints.glob("[0-9]*")), default="")
