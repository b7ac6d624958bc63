"""A step replayed as a CUDA graph is the step: the same bits, in every configuration, resumed, withheld or compiled."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moemamba import TrainConfig, ops, train
from moemamba.config import ExpertsConfig, ModelConfig
from moemamba.distributed import Processes
from moemamba.host.progress import Report
from moemamba.training.run import RunDirectory
from moemamba.training.update import step as stepping
from moemamba.training.update.step import Step, captures

gpu = pytest.mark.gpu
SILENT = Report(silent=True)
EXPERTS = ExpertsConfig(8, d_expert=64)
MODEL = ModelConfig("ME", 2, 64, experts=EXPERTS)
TIMES = {"seconds", "tokens_per_second", "mfu", "peak_memory"}


class Heard(Report):
    """Remembers its warnings."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(8000)))
    often: dict[str, Any] = {"log_every": 4, "eval_every": 6, "save_every": 6, "eval_tokens": 1024}
    run = str(tmp_path / "run")
    return TrainConfig(MODEL, str(text), run=run, steps=16, batch_size=8, context=96, warmup=0.2, **often)


def ran(config: TrainConfig, name: str, report: Report = SILENT, **changes: Any) -> dict[str, Any]:
    """All that a run in a directory of its own came to: lines of its metrics, weights and the optimiser's state."""
    config = dataclasses.replace(config, run=str(Path(config.run).with_name(name)), **changes)
    train(config, "auto", report=report)
    return found(config)


def found(config: TrainConfig) -> dict[str, Any]:
    from safetensors.torch import load_file

    run = RunDirectory(config.run)
    lines = [json.loads(line) for line in run.log.file.read_text().splitlines()]
    folder = max((run.path / "checkpoints").iterdir())
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")
    return {str(k): {key: value for key, value in line.items() if key not in TIMES} for k, line in enumerate(lines)} | {
        name: tensor for name, tensor in tensors.items() if not name.startswith("random")
    }


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    tensors = {name for name, value in a.items() if isinstance(value, torch.Tensor)}
    return [name for name in a if not (torch.equal(a[name], b[name]) if name in tensors else a[name] == b[name])]


def assert_same(config: TrainConfig, **changes: Any) -> None:
    plain = ran(config, "plain", cuda_graph="off", **changes)
    replayed = ran(config, "replayed", cuda_graph="on", **changes)
    assert any(isinstance(value, dict) and value["kind"] == "evaluation" for value in plain.values())
    if names := differing(plain, replayed):
        again = differing(plain, ran(config, "again", cuda_graph="off", **changes))
        pytest.fail(f"differ as a graph: {names}; and without, from run to run: {again}")


def model(pattern: str = "ME", **experts: Any) -> ModelConfig:
    return MODEL.replace(pattern=pattern, experts=dataclasses.replace(EXPERTS, **experts))


@gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "schedule": "wsd"},
        {"model": model(capacity_factor=1.0), "routing_groups": 2},
        {"model": model(bias_rate=0.01)},
        {"accumulate": 2},
        {"reset_state": True},
        {"reset_state": True, "accumulate": 2, "optimizer": "muon", "model": model(capacity_factor=1.0)},
        {"recompute": True},
        {"on_failure": "skip", "spike_factor": 1.05, "max_skips": 99, "steps": 32},
        {"sampling": "documents"},
        {"dtype": "float32"},
        {"carry_state": True},
        {"carry_state": True, "reset_state": True, "accumulate": 2, "on_failure": "skip", "spike_factor": 1.05},
        {"model": model("AFR(ME)", top_k=2, n_shared_experts=1)},
        {"model": model("AFR(ME)", top_k=2), "reset_state": True, "recompute": True},
    ],
    ids=str,
)
def test_the_same_bits(config: TrainConfig, changes: dict[str, Any]) -> None:
    assert_same(config, **changes)


@gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_the_same_bits_compiled(config: TrainConfig) -> None:
    assert_same(config, compile=True)


@gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("graphs", [("on", "on"), ("on", "off"), ("off", "on")], ids=str)
def test_resumption_is_exact(config: TrainConfig, optimizer: Any, graphs: tuple[Any, Any]) -> None:
    config = dataclasses.replace(config, optimizer=optimizer, on_failure="skip", spike_factor=50.0)
    whole = ran(config, "whole", cuda_graph="on")
    parted = dataclasses.replace(config, run=str(Path(config.run).with_name("parted")))
    train(dataclasses.replace(parted, cuda_graph=graphs[0]), stop=8, report=SILENT)
    train(dataclasses.replace(parted, cuda_graph=graphs[1]), "auto", report=SILENT)
    assert not differing(whole, found(parted))


@gpu
def test_withheld_updates(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that are not a number, in the warm-up and in the graph, which reads the factor where it is."""
    factor = torch.ones((), device="cuda")
    losses, take = stepping.losses, Step.__call__

    def scaled(*arguments: Any) -> Any:
        language, auxiliary = losses(*arguments)
        return language * factor, auxiliary

    def poisoned(self: Step, number: int, *arguments: Any) -> Any:
        factor.fill_(math.nan if number in (2, 9, 10) else 1.0)
        return take(self, number, *arguments)

    monkeypatch.setattr(stepping, "losses", scaled)
    monkeypatch.setattr(Step, "__call__", poisoned)
    for optimizer in ("adamw", "muon"):
        base = dataclasses.replace(config, optimizer=optimizer, on_failure="skip")
        plain, replayed = (ran(base, f"{optimizer}-{graph}", cuda_graph=graph) for graph in ("off", "on"))
        assert not differing(plain, replayed)
        skips = [line["step"] for line in replayed.values() if isinstance(line, dict) and line["kind"] == "skip"]
        assert skips == [2, 9, 10]
    with pytest.raises(ArithmeticError, match="not finite at step 2"):
        ran(config, "stopped", cuda_graph="on")


@gpu
def test_what_cannot_be_captured_runs_all_the_same(config: TrainConfig) -> None:
    """The reference backend counts the experts' tokens on the host."""
    heard = Heard()
    with ops.backend("reference"):
        plain, tried = ran(config, "plain", cuda_graph="off"), ran(config, "tried", heard)
        with pytest.raises(RuntimeError):
            ran(config, "asked", cuda_graph="on")
    assert len(heard.warnings) == 1 and "a step cannot be a CUDA graph" in heard.warnings[0]
    assert not differing(plain, tried)


def test_only_one_process_on_one_gpu_captures() -> None:
    here, there = torch.device("cpu"), torch.device("cuda", 0)
    assert not captures(TrainConfig(), Processes(here)) and captures(TrainConfig(), Processes(there))
    assert not captures(TrainConfig(cuda_graph="off"), Processes(there))
    assert not captures(TrainConfig(), Processes(there, 0, 2, True))
    for processes, why in ((Processes(here), "device is cpu"), (Processes(there, 0, 2, True), "several processes")):
        with pytest.raises(ValueError, match=why):
            captures(TrainConfig(cuda_graph="on"), processes)
