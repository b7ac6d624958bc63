"""Several runs at once: each with a GPU and a share of the cores; what ends one does not end the others."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moemamba import ModelConfig, TrainConfig
from moemamba.experiments.compare.runs import Task, carry_out, environments
from moemamba.experiments.results import read_history


@pytest.fixture
def base(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(3000)))
    return TrainConfig(
        model=ModelConfig("M", 1, 16),
        data=str(text),
        steps=4,
        batch_size=2,
        context=32,
        eval_every=4,
        eval_tokens=512,
        device="cpu",
    )


def test_runs_are_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(jobs: int, device: str) -> list[str | None]:
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments(jobs, device)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus(5, "auto") == gpus(5, "cuda") == ["0", "1", "0", "1", "0"]
    assert gpus(2, "cuda:1") == gpus(2, "cpu") == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert gpus(3, "auto") == ["GPU-a", "GPU-b", "GPU-a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus(2, "auto") == [None, None]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert {e["TORCHINDUCTOR_COMPILE_THREADS"] for e in environments(8, "cpu")} == {"4"}
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert {e["TORCHINDUCTOR_COMPILE_THREADS"] for e in environments(8, "cpu")} == {"1"}


class Broken(Task):
    """Ends its process, without a word, as it arrives there."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)


def test_a_run_that_fails_leaves_the_others_alone(base: TrainConfig, tmp_path: Path) -> None:
    """The rest is carried to its end, and the error names the run."""
    tasks = [
        kind(replace(base, run=str(tmp_path / name)), False, name)
        for kind, name in ((Broken, "broken"), (Task, "well"))
    ]
    with pytest.raises(RuntimeError, match="broken: "):
        carry_out(tasks, 2, silent=True)
    assert read_history(tmp_path / "well").evaluation[-1]["step"] == 4


class Early(Task):
    """Is there when Ctrl-C is, which the terminal sends to all processes: before its process can bear it."""

    def __reduce__(self) -> tuple[object, ...]:
        return _interrupted, (self.config, self.resume, self.label)


def _interrupted(*task: Any) -> Task:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored by what a shell starts in the background
    os.kill(os.getpid(), signal.SIGINT)
    return Task(*task)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_an_early_interrupt_says_nothing_of_its_own(
    base: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out([Early(replace(base, run=str(tmp_path / "run")), False, "early")], 2, silent=True)
    assert capfd.readouterr().err == "" and not (tmp_path / "run").exists()


def test_what_is_impossible_is_said_once(base: TrainConfig, tmp_path: Path) -> None:
    tasks = [
        Task(replace(base, run=str(tmp_path / name), validation=str(tmp_path / "none")), False, name) for name in "ab"
    ]
    with pytest.raises(FileNotFoundError, match="none"):
        carry_out(tasks, 2, silent=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_all_runs_save_when_a_signal_comes(base: TrainConfig, tmp_path: Path, number: signal.Signals) -> None:
    """Also when the process that started them is killed; the same command goes on."""
    out = tmp_path / "out"
    models = [f"{name}=mamba-tiny,d_model=16,n_blocks=1" for name in "ab"]
    options = (
        f"--steps 1000000 --batch-size 1 --context 16 --eval-tokens 64 --seeds 1 --jobs 2 --device cpu --out {out}"
    )
    command = [sys.executable, "-m", "moemamba", "compare", *models, *options.split(), "--data", str(base.data)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = [out / name / "seed-0" / "metrics.jsonl" for name in "ab"]
    _until(lambda: all(path.exists() for path in metrics))
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert "Go on with: moemamba compare" in said
    _until(lambda: all(list(path.parent.glob("checkpoints/[0-9]*")) for path in metrics))


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
