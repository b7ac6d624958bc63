"""Programs that show a run while it goes, by one option."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

from moemamba import ModelConfig, TrainConfig, train
from moemamba.config import ExpertsConfig
from moemamba.host.progress import Report
from moemamba.reading import to_dict

SILENT = Report(silent=True)


class Program(types.ModuleType):
    """What trackio and wandb have in common: `init`, `log` with rising steps, `finish`."""

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.runs, self.lines, self.open, self.fails_at = [], [], False, fails_at

    def init(self, *, project, name, config, resume, **more):
        assert not self.open
        self.open = True
        self.runs.append({"project": project, "name": name, "config": config, "resume": resume, **more})

    def log(self, metrics, step=None):
        assert self.open and all(isinstance(value, int | float) for value in metrics.values())
        if self.fails_at is not None and step >= self.fails_at:
            raise RuntimeError("the server is gone")
        self.lines.append((step, metrics))

    def finish(self):
        self.open = False


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("once upon a time there was\n\n" * 400)
    size = {"steps": 4, "batch_size": 2, "context": 16, "log_every": 1, "eval_every": 2, "save_every": 2}
    model = ModelConfig("ME", 1, 16, experts=ExpertsConfig(2))
    return TrainConfig(model, str(tmp_path / "text.txt"), run=str(tmp_path / "runs" / "mine"), **size)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_it_gets_every_figure_of_the_metrics(name, config, monkeypatch):
    program = Program(name)
    monkeypatch.setitem(sys.modules, name, program)
    asked = dataclasses.replace(config, track=name)
    train(asked, stop=2, report=SILENT)
    train(asked, resume=True, report=SILENT)
    first, again = program.runs
    assert (first["project"], first["name"], first["resume"]) == ("moemamba", "runs-mine", "never")
    assert again["resume"] == "allow" and first["config"]["model"]["pattern"] == "ME"
    assert not program.open
    written = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    for kind in ("train", "validation", "eval"):
        for line in (line for line in written if line["kind"] == kind):
            shown = [metrics for step, metrics in program.lines if step == line["step"] and f"{kind}/loss" in metrics]
            assert [metrics[f"{kind}/loss"] for metrics in shown] == [line["loss"]]
    assert any("router/layers.1.branches.0/entropy" in metrics for _, metrics in program.lines)
    assert [step for step, metrics in program.lines if "train/loss" in metrics] == [1, 2, 3, 4]


def test_where_it_fails_the_run_goes_on(config, monkeypatch):
    program = Program("trackio", fails_at=2)
    monkeypatch.setitem(sys.modules, "trackio", program)
    assert train(dataclasses.replace(config, track="trackio"), report=SILENT).step == 4
    said = (Path(config.run) / "metrics.jsonl").read_text()
    assert "trackio ends here: trackio: the server is gone" in said


def test_what_is_not_installed_is_said_before_any_work(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'moemamba\[wandb\]'"):
        train(dataclasses.replace(config, track="wandb"), report=SILENT)
    assert not (Path(config.run) / "train.json").exists()


def test_runs_without_it_are_described_as_ever(config):
    assert "track" not in to_dict(config)
    assert to_dict(dataclasses.replace(config, track="wandb"))["track"] == "wandb"


@pytest.mark.filterwarnings("ignore")
def test_trackio_itself(config, monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import inspect

    import trackio

    assert {"project", "name", "config", "resume"} <= set(inspect.signature(trackio.init).parameters)
    assert {"metrics", "step"} <= set(inspect.signature(trackio.log).parameters)
    assert "never" in str(inspect.signature(trackio.init).parameters["resume"].default)


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself(config, monkeypatch, tmp_path):
    """Offline: it writes a file of its own."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(dataclasses.replace(config, track="wandb"), report=SILENT)
    files = list((Path(config.run) / "wandb").rglob("*.wandb"))
    assert files and files[0].stat().st_size > 1000
