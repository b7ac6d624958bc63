"""State passing: rows that read on, with the state of the batch before; against one long call and a plain loop."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import fake_tokens

from moemamba import ModelConfig, TrainConfig, load, train
from moemamba.config import AttentionConfig, ExpertsConfig
from moemamba.data.batches import Batches, Lanes
from moemamba.data.config import DataConfig
from moemamba.data.corpora import open_corpora
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer
from moemamba.training.spread import check
from moemamba.training.update.carry import Carried

SILENT = Report(silent=True)
MODEL = ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, capacity_factor=1.0))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for k in range(30):
        (text / f"{k:02d}.txt").write_text("".join(f"{k} times {j} is {k * j}\n" for j in range(20 + 11 * (k % 7))))
    often = {"log_every": 1, "eval_every": 4, "save_every": 4, "eval_tokens": 256}
    return TrainConfig(
        MODEL, str(text), run=str(tmp_path / "run"), steps=8, batch_size=4, context=32, carry_state=True, **often
    )


def losses(config):
    lines = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("reset", [False, True])
def test_rows_read_on(reset):
    """Each row's windows follow one another, all rows together read none twice, and what goes on says so."""
    tokens = fake_tokens([37, 50, 33, 8, 90, 64, 128, 40])
    lanes = Lanes(tokens, 8, seed=5, rows=3, reset_state=reset)
    assert lanes.stretch == 18
    batches, numbers = Batches(lanes, 3), np.arange(3 * 2 * lanes.stretch, dtype=np.uint64)
    windows = lanes.chosen(numbers).reshape(2, lanes.stretch, 3)
    starts = set()
    for epoch in windows:
        assert len(np.unique(epoch)) == epoch.size
        assert (np.diff(epoch, axis=0) % lanes.windows == 1).all()
        starts.add(tuple(epoch[0]))
    assert len(starts) == 2  # another place in each epoch
    assert (Lanes(tokens, 8, seed=6, rows=3).chosen(numbers) != lanes.chosen(numbers)).any()
    begins = {0, *tokens.ends.tolist()}
    for step in range(2 * lanes.stretch):
        batch = batches[step]
        for row, window in enumerate(windows.reshape(-1, 3)[step]):
            assert batch.tokens[row].tolist() == tokens.ids[window * 8 : window * 8 + 8].tolist()
            goes_on = step % lanes.stretch > 0 and window > 0 and not (reset and window * 8 in begins)
            assert bool(batch.goes_on[row]) == goes_on
    parts = Batches(lanes, 1)  # rows of a batch may be read in parts
    assert torch.equal(torch.cat([parts[3 * 4 + k].tokens for k in range(3)]), batches[4].tokens)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_one_long_sequence(config, accumulate):
    """With weights that do not move: the loss of each step is that of the same tokens in one call from the start."""
    config = dataclasses.replace(
        config, learning_rate=1e-30, accumulate=accumulate, model=MODEL.replace(capacity_factor=None)
    )
    train(config, report=SILENT)
    model = load(config.run)[0]
    rows = open_corpora(config.reads(), ByteTokenizer(), SILENT).rows(config.reads())
    batches = [Batches(rows, 4)[step] for step in range(8)]
    assert all(batch.goes_on.all() for batch in batches[1:])
    with torch.no_grad():
        logits = model(torch.cat([batch.tokens for batch in batches], 1)).logits
    targets = torch.cat([batch.targets for batch in batches], 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = expected.view(4, 8, 32).mean((0, 2)).tolist()
    assert losses(config) == pytest.approx(expected, abs=1e-5)
    other = dataclasses.replace(config, carry_state=False, run=f"{config.run}-without")
    train(other, report=SILENT)
    assert losses(other)[1:] != pytest.approx(expected[1:], abs=1e-3)


def test_the_gradient_stops_at_the_batch(config):
    """Two steps by hand: state of the first, detached, into the second; the update is that of the run."""
    config = dataclasses.replace(config, steps=2, save_every=1, keep=9, clip=1e9, eval_every=9)
    train(config, report=SILENT)
    folder = Path(config.run) / "checkpoints"
    model = load(folder / "00000001")[0].train()
    rows = open_corpora(config.reads(), ByteTokenizer(), SILENT).rows(config.reads())
    first, second = (Batches(rows, 4)[step] for step in (0, 1))
    initial = dataclasses.replace(config, steps=1, learning_rate=1e-30, run=f"{config.run}-initial")
    train(initial, report=SILENT)
    with torch.no_grad():
        state = load(initial.run)[0].train()(first.tokens).state  # of the weights that the first step began with
    output = model(second.tokens, state=state, targets=second.targets)
    weights = MODEL.experts.balance_weight, MODEL.experts.z_weight
    auxiliary = sum(weights[0] * s.balance_loss + weights[1] * s.z_loss for s in output.router) / len(output.router)
    (output.loss + auxiliary).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    lines = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "train"][1]
    assert found["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_resumed_is_the_same_run(config, accumulate):
    whole = dataclasses.replace(config, run=f"{config.run}-whole")
    train(whole, report=SILENT)
    train(config, stop=3, report=SILENT)
    train(dataclasses.replace(config, accumulate=1), resume=True, stop=5, report=SILENT)
    train(dataclasses.replace(config, accumulate=1), resume=True, report=SILENT)
    for (name, ours), (_, theirs) in zip(
        load(config.run)[0].state_dict().items(), load(whole.run)[0].state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert losses(config) == losses(whole)


def test_a_checkpoint_without_its_state_is_damaged(config):
    train(config, stop=4, report=SILENT)
    file = Path(config.run) / "checkpoints" / "00000004" / "carried.safetensors"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=r"carried\.safetensors is missing"):
        train(config, resume=True, report=SILENT)
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"carried\.safetensors is damaged"):
        train(config, resume=True, report=SILENT)
    shutil.rmtree(config.run)


def test_nothing_is_carried_from_a_step_that_failed():
    from moemamba.layers import MambaState
    from moemamba.state import State

    carried = Carried()
    bad = State((MambaState(torch.full((2, 3, 3), torch.nan), torch.ones(2, 3, 4)),))
    carried.keep([bad], torch.tensor(True))
    state = carried.before(0, torch.tensor([True, True]))
    assert all(tensor.eq(0).all() for tensor in state.mixers[0])
    good = State((MambaState(torch.ones(2, 3, 3), torch.ones(2, 3, 4)),))
    carried.keep([good], torch.tensor(False))
    state = carried.before(0, torch.tensor([True, False]))
    assert all(tensor[0].eq(1).all() and tensor[1].eq(0).all() for tensor in state.mixers[0])


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({"model": ModelConfig("MA", 1, 16, attention=AttentionConfig(2))}, 1, "attention grows with every token"),
        ({"model": ModelConfig("E", 1, 16)}, 1, "no letter of the pattern 'E' has a state"),
        ({}, 2, "2 processes train; start one"),
    ],
)
def test_what_cannot_be_carried(config, changes, size, said):
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(config, **changes), size)


def test_text_that_rows_cannot_read_on_in(config):
    with pytest.raises(ValueError, match="several texts are mixed"):
        dataclasses.replace(config, data=("a", "b"))
    with pytest.raises(ValueError, match="documents"):
        DataConfig(sampling="documents", lanes=4)
    with pytest.raises(ValueError, match="fewer than batch_size = 100"):
        Lanes(fake_tokens([50]), 8, 0, 100)
