"""What is saved stays: nothing intact is called damaged, nothing of others removed; what cannot work is refused."""

import dataclasses
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moemamba import ModelConfig, MoEMamba, State, TrainConfig, checkpoint, load, save, train
from moemamba.checkpoint import CheckpointError, Damaged, checkpoints
from moemamba.cli.info import costs
from moemamba.config import ExpertsConfig
from moemamba.counting import memory, require_memory, size
from moemamba.distributed import Processes
from moemamba.experiments.compare import compare, parse_contenders
from moemamba.host.files import replace
from moemamba.host.lock import Lock
from moemamba.host.memory import limit
from moemamba.host.progress import Report
from moemamba.presets import preset
from moemamba.tensors import TensorFile, write_tensors
from moemamba.text import ByteTokenizer
from moemamba.training.run import RunDirectory, read_position, restore, restoring
from moemamba.training.update import optimizer_of

FIRST = Path(__file__).parents[1] / "fixtures" / "v0.1"
SILENT = Report(silent=True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run at step 8 of 12 with checkpoints at 4 and 8, written by an older version and so without checksums."""
    shutil.copytree(FIRST / "prepared", tmp_path / "prepared")
    shutil.copytree(FIRST / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return RunDirectory("run")


def resumed(run: RunDirectory):
    return train(run.config(), resume=True, report=SILENT)


def names(run: RunDirectory) -> set[str]:
    return {path.name for path in (run.path / "checkpoints").iterdir()}


# Only what was written is removed


def test_resuming_removes_nothing_of_others(run, tmp_path):
    folder = run.path / "checkpoints"
    for name in (".00000012", ".00000012.77", ".backup-best", ".ipynb_checkpoints", ".000"):
        (folder / name / "inside").mkdir(parents=True)
    for name in (".DS_Store", ".nfs0001", ".00000013"):
        (folder / name).write_text("x")
    (tmp_path / "other" / "kept").mkdir(parents=True)
    (folder / ".00000014").symlink_to(tmp_path / "other")
    run.occupy(True)
    run.close()
    left = {".backup-best", ".ipynb_checkpoints", ".000", ".DS_Store", ".nfs0001", ".00000013", ".00000014"}
    assert names(run) == left | {"00000004", "00000008"} and (tmp_path / "other" / "kept").is_dir()


def test_nothing_is_removed_through_a_link(run, tmp_path):
    victim = (run.path / "checkpoints").rename(tmp_path / "victim")
    (victim / ".00000003").mkdir()
    (victim / ".git").mkdir()
    (run.path / "checkpoints").symlink_to(victim)
    resumed(run)
    assert {path.name for path in victim.iterdir()} == {".00000003", ".git", "00000004", "00000008", "00000012"}


# Damage is what a checksum or a header says


def test_what_the_machine_cannot_read_is_not_damaged(run, monkeypatch):
    def no_memory(*arguments, **more):
        raise OSError(12, "Cannot allocate memory")

    for place, name in ((restoring, "examine"), (TensorFile, "verify"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, no_memory)
            with pytest.raises(OSError, match="Cannot allocate memory"):
                resumed(run)
        assert names(run) == {"00000004", "00000008"}


def test_another_model_is_named(run):
    values = json.loads((run.path / "train.json").read_text())
    values["model"]["d_model"] = 8
    (run.path / "train.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"another model .*embedding\.weight is 257x4, expected 257x8.* more"):
        resumed(run)
    assert names(run) == {"00000004", "00000008"}


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_flipped_bit_is_damage(run, name, capsys):
    resumed(run)  # writes step 12, with checksums
    whole = load("run")[0]
    file = run.path / "checkpoints" / "00000012" / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"does not have the checksum.*use .*00000008 instead"):
        load(file.parent) if name.startswith("model") else restoring.verify(TensorFile(file))
    train(run.config(), resume=True)
    assert "damaged-00000012" in capsys.readouterr().out and names(run) >= {"damaged-00000012", "00000012"}
    assert all(map(torch.equal, load("run")[0].state_dict().values(), whole.state_dict().values()))


def test_numbers_that_are_not_finite(tmp_path):
    model = MoEMamba(ModelConfig("ME", 1, 8, experts=ExpertsConfig(2)))
    save(tmp_path / "m", model, ByteTokenizer())
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, file)  # without checksums, as older versions
    with pytest.raises(CheckpointError, match=r"not finite \(norm\.weight\)"):
        load(tmp_path / "m")
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"not finite \(norm\.weight\)"):
        save(tmp_path / "n", model, ByteTokenizer())
    assert not (tmp_path / "n").exists()


def test_an_old_checkpoint_without_an_evaluation(run):
    file = run.path / "checkpoints" / "00000004" / "training.json"
    for text in ("{}", '{"evaluation": null, "step": 4}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(Damaged):
            read_position(file.parent)
    assert resumed(run).step == 12


@pytest.mark.parametrize("change", [{"step": "30"}, {"step": -5}, {"step": 10**9}, {"seconds": "x"}, {"skips": 3}])
def test_a_position_of_the_wrong_kind(run, change):
    file = run.path / "checkpoints" / "00000008" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert resumed(run).step == 12 and "damaged-00000008" in names(run)


# Files are looked at before they are read


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_devices_are_refused_at_once(run, name):
    folder = run.path / "checkpoints" / "00000008"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        load(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        load(folder)


def test_a_million_blocks_are_not_built(run):
    file = run.path / "checkpoints" / "00000008" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"n_blocks": 10**6}))
    with pytest.raises(CheckpointError, match="too few for the 4,000,000 layers"):
        load(file.parent)
    file.write_text(json.dumps(values | {"n_blocks": 10**9, "d_model": 1 << 40}))
    with pytest.raises(ValueError, match=r"the model needs .* of memory"):
        load(file.parent)


def test_the_format_is_that_of_others(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.randn(()).bfloat16(), "e": torch.empty(0, 2)}
    write_tensors(tmp_path / "x", tensors)
    theirs = load_file(tmp_path / "x")
    stored = TensorFile(tmp_path / "x")
    stored.verify()
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(stored[name][...], tensor)
    assert torch.equal(stored["a"][1:3], tensors["a"][1:3])


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "m", MoEMamba(ModelConfig("M", 1, 8)), ByteTokenizer())
        State(()).save(tmp_path / "state")
    finally:
        os.umask(before)
    for file in (*(tmp_path / "m").iterdir(), tmp_path / "state"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


# What load would refuse is not saved


def test_wrapped_and_tied_models_are_saved(tmp_path):
    model = MoEMamba(ModelConfig("ME", 1, 8, experts=ExpertsConfig(2)))
    model.head.weight = model.embedding.weight
    for name, wrapped in (
        ("c", torch.compile(model, backend="eager")),
        ("d", torch.nn.DataParallel(model)),
        ("t", model),
    ):
        save(tmp_path / name, wrapped, ByteTokenizer())
        assert torch.equal(load(tmp_path / name)[0].head.weight, model.embedding.weight)
    model.embedding = torch.nn.Embedding(300, 8)
    with pytest.raises(ValueError, match=r"embedding\.weight is 300x8, expected 257x8"):
        save(tmp_path / "resized", model, ByteTokenizer())
    with pytest.raises(ValueError, match="Linear is no MoEMamba"):
        save(tmp_path / "other", torch.nn.Linear(2, 2), ByteTokenizer())
    assert not (tmp_path / "resized").exists()


def test_folders_without_a_model_say_what_they_are(tmp_path, run):
    (tmp_path / "cmp" / "a" / "seed-0").mkdir(parents=True)
    (tmp_path / "cmp" / "a" / "seed-0" / "train.json").touch()
    with pytest.raises(CheckpointError, match=r"comparison; name one of its runs, such as .*a/seed-0"):
        load(tmp_path / "cmp")
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load(run.path)
    with pytest.raises(CheckpointError, match="holds no model; name a run"):
        load(tmp_path)


# Memory


def test_what_cannot_fit_is_refused_before_work(tmp_path, monkeypatch):
    big = preset("moe-mamba-100m")
    monkeypatch.setattr(checkpoint.memory, "limit", lambda: 24 << 30)
    config = TrainConfig(model=big, run=str(tmp_path / "run"), device="cpu")
    figures = {name: value for name, value, _ in costs(big, 1024)}
    with pytest.raises(ValueError, match=f"weights {figures['weights']}, gradients {figures['gradients']}, optimiser"):
        train(config, report=SILENT)
    assert not (tmp_path / "run").exists()
    contenders = parse_contenders(["mamba-tiny", "moe-mamba-100m"])
    with pytest.raises(ValueError, match="the model needs"):
        compare(contenders, dataclasses.replace(config, model=ModelConfig()), 1, tmp_path / "cmp", silent=True)
    assert not (tmp_path / "cmp").exists()
    require_memory(big, 24 << 30)  # its weights alone would fit
    assert size(sum(memory(big))) in figures["weights"] or sum(memory(big)) == 4 * memory(big).weights
    with pytest.raises(ValueError, match="the model needs"):
        train(dataclasses.replace(config, model=dataclasses.replace(big, n_blocks=10**9)), report=SILENT)


def test_the_limit_is_the_smallest(monkeypatch):
    resource = pytest.importorskip("resource")
    assert limit() is None or limit() > 1 << 28
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (123 << 20, -1))
    assert limit() == 123 << 20


# Locks and errors of the system


def test_a_lock_where_flock_is_missing(tmp_path):
    """A file system without flock: POSIX locks hold between processes."""
    program = """
import errno, fcntl, sys
def missing(*arguments): raise OSError(errno.ENOSYS, "no")
fcntl.flock = missing
from pathlib import Path
from moemamba.host.lock import Lock
lock = Lock(Path(sys.argv[1]))
print(repr(lock.take()), lock.holds, flush=True)
input()
"""
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "None True\n"
        second = subprocess.run(command, input="\n", capture_output=True, text=True, check=True)
        assert f"process {first.pid}" in second.stdout and "False" in second.stdout
        first.communicate("\n")
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="is not a regular file"):
        Lock(tmp_path / "link").take()
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_run_directory_that_is_gone(run):
    shutil.rmtree(run.path)
    with pytest.raises(OSError, match="its folder is gone") as caught:
        run.log("train", step=1)
    assert "free space" not in str(caught.value) and "Errno" not in str(caught.value)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "x").write_text("before")
    with pytest.raises(OSError, match=r"cannot write .*x: No space left on device; free space"):
        replace(tmp_path / "x", "after")
    assert (tmp_path / "x").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_only_numbered_folders_are_checkpoints(run):
    (run.path / "checkpoints" / "00000099").write_text("a file")
    (run.path / "checkpoints" / "²²²²²²²²").mkdir()
    (run.path / "checkpoints" / "100000000").mkdir()
    assert [path.name for path in checkpoints(run.path)] == ["00000004", "00000008", "100000000"]


def test_a_huge_header_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match="no header"):
        TensorFile(tmp_path / "x")


@dataclasses.dataclass(frozen=True)
class AnotherFails(Processes):
    """The first of two processes, of which the other cannot read the checkpoint."""

    def any(self, fact: bool) -> bool:
        return True


def test_what_another_machine_cannot_read_is_not_damaged(run):
    config = run.config()
    model = MoEMamba(config.model)
    content = read_position(run.path / "checkpoints" / "00000008").content
    with pytest.raises(OSError, match=r"00000008 is intact here .* the same for all machines"):
        restore(run, model, optimizer_of(model, config), content, print, AnotherFails(torch.device("cpu")))
    assert names(run) == {"00000004", "00000008"}


def test_a_step_beyond_the_run_is_refused(run):
    shorter = dataclasses.replace(run.config(), steps=6)
    model = MoEMamba(shorter.model)
    content = read_position(run.path / "checkpoints" / "00000008").content
    one = Processes(torch.device("cpu"))
    with pytest.raises(ValueError, match="at step 8, but the run is to have 6"):
        restore(run, model, optimizer_of(model, shorter), content, print, one, shorter.steps)
