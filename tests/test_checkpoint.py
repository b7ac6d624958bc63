"""Checkpoints: complete or absent, and exactly the model that was saved."""

import json
import os
import subprocess
import sys

import pytest
import torch

import moemamba
from moemamba import ModelConfig, MoEMamba
from moemamba.checkpoint import CheckpointError, load, save
from moemamba.config import ExpertsConfig
from moemamba.host.files import new_directory
from moemamba.text import ByteTokenizer

TOKENS = torch.arange(12).view(2, 6)
FULL_DISK = """
import resource, signal, sys, torch
from moemamba import ModelConfig, MoEMamba, save
from moemamba.text import ByteTokenizer
model = MoEMamba(ModelConfig("M", 1, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: every longer file fails
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save(sys.argv[1], model, ByteTokenizer())
except OSError as error:
    print(error)
"""


def small(**changes):
    return MoEMamba(ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, bias_rate=0.1)).replace(**changes))


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied):
    model = small(tie_embeddings=tied)
    model.update_balance_bias(model(TOKENS).router)  # buffers travel too
    save(tmp_path / "new" / "model", model, ByteTokenizer())
    loaded, tokenizer = load(tmp_path / "new" / "model")
    assert loaded.config == model.config and isinstance(tokenizer, ByteTokenizer) and not loaded.training
    expected = model.state_dict()
    assert any(value.abs().sum() for name, value in expected.items() if "balance_bias" in name)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    names = {file.name for file in (tmp_path / "new" / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_run_means_its_newest_checkpoint(tmp_path):
    models = {step: small() for step in (5, 20, 100)}
    for step, model in models.items():
        save(tmp_path / "checkpoints" / f"{step:08d}", model, ByteTokenizer())
    (tmp_path / "checkpoints" / ".00000200.1").mkdir()  # what a killed process leaves
    loaded, _ = load(tmp_path)
    assert torch.equal(loaded.head.weight, models[100].head.weight)


def test_never_overwrites(tmp_path):
    save(tmp_path / "m", model := small(), ByteTokenizer())
    with pytest.raises(FileExistsError, match="m exists already; choose another place"):
        save(tmp_path / "m", small(), ByteTokenizer())
    assert torch.equal(load(tmp_path / "m")[0].head.weight, model.head.weight)


def test_nothing_half_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "x") as folder:
        (folder / "file").write_text("half")
        assert not (tmp_path / "x").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_process_with_our_number(tmp_path):
    (tmp_path / f".x.{os.getpid()}").mkdir()
    (tmp_path / f".x.{os.getpid()}" / "half").touch()
    with new_directory(tmp_path / "x") as folder:
        (folder / "whole").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "whole"]


def test_full_disk(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "m")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "m: " in result.stdout and "free space" in result.stdout and result.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_named_with_the_remedy(tmp_path, name, damage):
    for step in (1, 2):
        save(tmp_path / "checkpoints" / f"{step:08d}", small(), ByteTokenizer())
    file = tmp_path / "checkpoints" / "00000002" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    said = "is missing" if damage == "missing" else "is damaged or incomplete"
    with pytest.raises(CheckpointError, match=rf"00000002.{name} {said}.*; use .*00000001 instead") as caught:
        load(tmp_path / "checkpoints" / "00000002")
    assert "\n" not in str(caught.value)
    load(tmp_path / "checkpoints" / "00000001")


def test_wrong_values(tmp_path):
    save(tmp_path / "m", small(), ByteTokenizer())
    file = tmp_path / "m" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"d_modell": 16}))
    with pytest.raises(ValueError, match=r"config\.json has the unknown key 'd_modell'"):
        load(tmp_path / "m")
    file.write_text(json.dumps(values | {"d_model": 32}))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is of another model .*embedding\.weight is 257x16, expected 257x32"
    ):
        load(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"there is no model at .*nowhere"):
        load(tmp_path / "nowhere")


def test_public_names():
    assert moemamba.load is load and moemamba.save is save
