"""What older versions wrote still opens, and goes on."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moemamba import State, TrainConfig, cli, generate, load, train
from moemamba.config import ExpertsConfig, ModelConfig
from moemamba.host.progress import Report
from moemamba.training.run import RunDirectory

SILENT = Report(silent=True)
FIRST = Path(__file__).parent / "fixtures" / "v0.1"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy to work in, which is the current folder, as when it was written."""
    folder = shutil.copytree(FIRST, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def test_they_are_small():
    for part in FIRST.iterdir():
        files = [part] if part.is_file() else [file for file in part.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 200_000, part


def test_a_run_loads_and_generates(old):
    model, tokenizer = load("run")
    logits = model(torch.tensor([tokenizer.encode("The river carries ")])).logits[0, -1]
    torch.testing.assert_close(logits[:3], torch.tensor([-0.0697997584939, -0.09456910938, -0.009278013371]))
    assert len(generate(model, [tokenizer.encode("The")], 8, seed=0)[0]) == 8
    assert load("run/checkpoints/00000004")[0].config == model.config


def test_a_state_continues_its_model(old):
    logits = load("run")[0](torch.tensor([[65]]), State.load("state.safetensors")).logits[0, -1]
    torch.testing.assert_close(logits[:3], torch.tensor([-0.023500844837, -0.056574355811, 0.0149276964366]))


def test_a_run_resumes_from_its_checkpoint(old):
    result = train(RunDirectory("run").config(), resume=True, report=SILENT)
    assert result.step == 12 and result.loss == pytest.approx(5.456645, abs=1e-4)
    assert result.evaluation.loss == pytest.approx(5.455819, abs=1e-4)
    steps = [int(folder.name) for folder in sorted((old / "run" / "checkpoints").iterdir())]
    assert steps == [8, 12]


def test_a_prepared_folder_trains(old):
    model = ModelConfig("ME", 1, 8, experts=ExpertsConfig(2))
    small = replace(TrainConfig(), model=model, data="prepared", run="new", steps=2, batch_size=2, context=32)
    assert train(replace(small, eval_tokens=64, device="cpu"), report=SILENT).step == 2


def test_results_are_reported(old, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moemamba", "report", "results.json", "--out", "page.html"])
    cli.main()
    assert "page.html" in capsys.readouterr().out and "moe, seed 0" in (old / "page.html").read_text()
