"""Several processes agree on signals, on what they run and how long they wait; they start and branch as one does."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moemamba import ModelConfig, TrainConfig, load, train
from moemamba.config import ExpertsConfig
from moemamba.distributed import join, sources
from moemamba.host.progress import Report
from moemamba.host.stop import Interrupted
from moemamba.training import loop

pytestmark = pytest.mark.slow
SILENT = Report(silent=True)
MODEL = ModelConfig("ME", 1, 16, experts=ExpertsConfig(4))
SHARED = {"shard": "parameters", "expert_parallel": 2}


def work(rank, folder, port, config):
    """All that two processes are asked for here, in one go; what each found is written to a file of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    found = {}
    with join("cpu", 0.5):
        for name, change in beginnings(folder).items():
            train(dataclasses.replace(config, run=str(folder / f"{name}-2"), **SHARED, **change), report=SILENT)
        found["signal"] = signalled(rank, dataclasses.replace(config, run=str(folder / "signalled")))
        found["alike"] = other_sources(rank, dataclasses.replace(config, run=str(folder / "other-sources")))
    os.environ["MASTER_PORT"] = str(port + 1)
    (folder / f"{rank}.here").touch()
    while not (folder / f"{1 - rank}.here").exists():  # meeting takes no longer than the limit
        time.sleep(0.01)
    found["late"] = late(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def beginnings(folder):
    return {
        "start": {"start": str(folder / "trunk"), "steps": 4},
        "branch": {"branch": str(folder / "trunk" / "checkpoints" / "00000010"), "steps": 14, "cooldown": 4 / 14},
    }


def signalled(rank, config):
    """The second process alone is told to stop, before its sixth step; lines are logged every 1,000 steps."""
    rate = loop.learning_rate

    def tell(config, step, warmup):
        if rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return rate(config, step, warmup)

    loop.learning_rate = tell
    try:
        train(dataclasses.replace(config, steps=200, log_every=1000, save_every=1000, eval_every=1000), report=SILENT)
    except Interrupted as stopped:
        return stopped.number, str(stopped)
    finally:
        loop.learning_rate = rate
    return None


def other_sources(rank, config):
    loop.sources = lambda: f"{rank}"
    try:
        train(config, report=SILENT)
    except ValueError as error:
        return str(error)
    finally:
        loop.sources = sources
    return None


def late(rank):
    """What a process alone does may take long; a step may not: the limit is 4 seconds."""
    waited = None
    try:
        with join("cpu", 4 / 60) as processes:
            time.sleep(5 * rank)
            processes.once(lambda: None)
            processes.wait()
            waited = True
            time.sleep(8 * rank)
            processes.sum([torch.ones(1)])
    except RuntimeError as error:
        return waited, str(error)
    return waited, None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process has done, and two."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "text.txt").write_text(Path(dataclasses.__file__).read_text())
    config = TrainConfig(
        MODEL,
        str(folder / "text.txt"),
        run=str(folder / "trunk"),
        steps=20,
        schedule="wsd",
        batch_size=4,
        context=16,
        routing_groups=2,
        log_every=1,
        eval_every=100,
        eval_tokens=64,
        save_every=10,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, report=SILENT)
    for name, change in beginnings(folder).items():
        train(dataclasses.replace(config, run=str(folder / f"{name}-1"), **change), report=SILENT)
    torch.set_num_threads(threads)
    multiprocessing.set_forkserver_preload([__name__])  # forked from one that has imported all of this already
    mp.start_processes(work, (folder, free_port(), config), 2, start_method="forkserver")
    return folder


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def found(folder, what):
    return [json.loads((folder / f"{rank}.json").read_text())[what] for rank in range(2)]


@pytest.mark.parametrize("name", ["start", "branch"])
def test_beginnings(name, folder):
    one, two = (
        [json.loads(line) for line in (folder / f"{name}-{size}" / "metrics.jsonl").read_text().splitlines()]
        for size in (1, 2)
    )
    one, two = ([line for line in lines if line["kind"] == "train"] for lines in (one, two))
    assert len(one) == len(two) == (4 if name == "start" else 14)
    for mine, its in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=2e-4)
        assert mine["learning_rate"] == its["learning_rate"]
    first, last = (load(folder / f"{name}-{size}")[0].state_dict() for size in (1, 2))
    for place, value in first.items():
        torch.testing.assert_close(last[place], value, atol=5e-4, rtol=0, msg=place)


def test_a_signal_to_one_stops_all_at_that_step(folder):
    for number, said in found(folder, "signal"):
        assert number == signal.SIGUSR1 and "stopped by SIGUSR1; step 6 is saved" in said
    assert (folder / "signalled" / "checkpoints" / "00000006").is_dir()


def test_other_sources_are_refused(folder):
    here = socket.gethostname()
    said = f"the versions of PyTorch or sources of moemamba on {here} are not those on {here}"
    assert all(each.startswith(said) for each in found(folder, "alike"))
    assert not (folder / "other-sources").exists()


def test_a_step_has_a_time_limit_and_waiting_has_none(folder):
    (waited, error), _ = found(folder, "late")
    assert waited and "imed out" in error


def test_sources():
    assert len(sources()) == 64 and sources() == sources()


def test_one_process_has_no_flags():
    """Nothing of signals may enter a step that could be captured."""
    from moemamba.distributed import Agreement, Processes
    from moemamba.host.stop import Stop

    with Stop() as signals:
        agreement = Agreement(signals, Processes(torch.device("cpu")))
        assert agreement.flags() == [] and agreement.number() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert agreement.flags() == [] and agreement.number() == signal.SIGTERM
    assert not dist.is_initialized()
