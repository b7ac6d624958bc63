"""Contexts beyond those of training: against one call over the whole sequence, and plain loops over its tokens."""

import json
import math

import numpy as np
import pytest
import torch
from documents import fake_tokens
from models import build

from moemamba import TrainConfig, train
from moemamba.cli import run
from moemamba.data.batches import Tokens
from moemamba.host.progress import Report
from moemamba.longcontext import TASKS, by_position, recall
from moemamba.longcontext.positions import bin_edges
from moemamba.longcontext.recall import FRONT, _prompt
from moemamba.longcontext.sequences import sequences
from moemamba.text import ByteTokenizer

BYTES = ByteTokenizer()


def small_tokens(lengths):
    """Documents of tokens below 31, which the small models know."""
    tokens = fake_tokens(lengths)
    ids = np.random.default_rng(0).integers(0, 31, len(tokens.ids)).astype(np.uint16)
    return Tokens(ids, tokens.ends, tokens.bytes)


@pytest.mark.parametrize("name", ["M", "A", "E", "mixed", "R independent"])
@pytest.mark.parametrize("piece", [7, 64])
def test_loss_by_position_is_that_of_one_long_call(name, piece):
    model = build(name, torch.float32)
    tokens = small_tokens([70, 30, 45, 64])
    found = by_position(model, tokens, 20, batch_size=2, piece=piece, since=4, forgets=5)
    starts = [0, 20, 40, 70, 100, 120, 145, 165, 185]
    assert sorted(sequences(tokens, 20).starts) == starts and (found.sequences, found.documents) == (9, 4)
    loss, short = [], []
    for start in starts:
        ids = torch.from_numpy(tokens.ids[start : start + 21].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
            parts = torch.cat([model(ids[:, k : k + 5]).logits[0] for k in range(0, 20, 5)])
        loss.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy())
        short.append(torch.nn.functional.cross_entropy(parts, ids[0, 1:], reduction="none").numpy())
    loss, short = np.stack(loss), np.stack(short)
    document = np.searchsorted(tokens.ends, starts, side="right")
    assert [(each.first, each.last) for each in found.bins] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 20)]
    for each in found.bins:
        own = slice(each.first - 1, each.last)
        rows = loss[:, own].mean(1)
        assert each.loss == pytest.approx(rows.mean(), abs=1e-5)
        assert each.change == pytest.approx((rows - loss[:, 2:4].mean(1)).mean(), abs=1e-5)
        assert each.gain == pytest.approx((loss - short)[:, own].mean(), abs=1e-5)
        groups = [rows[document == k] for k in range(4)]
        spread = sum((len(g) / 9 * (g.mean() - rows.mean())) ** 2 for g in groups)
        assert each.standard_error == pytest.approx(math.sqrt(spread * 4 / 3), abs=1e-5)
    assert [each.gain for each in found.bins[:3]] == pytest.approx([0] * 3, abs=1e-6)  # nothing was forgotten yet


def test_routing_by_position_counts_every_choice():
    model = build("mixed", torch.float32)
    tokens = small_tokens([60, 60])
    found = by_position(model, tokens, 16, batch_size=3, piece=5, since=1)
    counts = {load.router: np.zeros((len(found.bins), len(load.load[0]))) for load in found.routers}
    assert list(counts) == list(model.router_names)
    for start in sequences(tokens, 16).starts:
        record = []
        ids = torch.from_numpy(tokens.ids[start : start + 16].astype(np.int64))[None]
        with torch.no_grad():
            model(ids, record=record)
        for table, choice in zip(counts.values(), record, strict=True):
            for position, experts in enumerate(choice.indices[0].tolist(), start=1):
                for expert in experts:
                    table[np.searchsorted(bin_edges(16), position, side="right") - 1, expert] += 1
    for load in found.routers:
        expected = counts[load.router] / counts[load.router].sum(1, keepdims=True)
        assert np.allclose(load.load, expected)
        assert load.shift(2, 2) == 0 and load.shift(2, 0) == pytest.approx(abs(expected[2] - expected[0]).sum() / 2)
        shares = expected[3][expected[3] > 0]
        assert load.entropy(3) == pytest.approx(-(shares * np.log(shares)).sum() / math.log(expected.shape[1]))


def test_sequences_are_of_one_document_and_spread_over_them():
    tokens = small_tokens([21, 100, 20, 45])
    found = sequences(tokens, 20)
    assert found.starts.tolist() == [0, 21, 141, 41, 161, 61, 81] and found.groups.tolist() == [0, 1, 3, 1, 3, 1, 1]
    assert sequences(tokens, 20, 3).groups.tolist() == [0, 1, 3]
    assert sequences(tokens, 60, across=True).starts.tolist() == [0, 60, 120]
    with pytest.raises(ValueError, match="no document has the 121 tokens of a sequence, the longest 100"):
        sequences(tokens, 120)
    with pytest.raises(ValueError, match="the text has 186 tokens"):
        sequences(tokens, 300, across=True)
    for changes, said in (({"since": 21}, "since is 21"), ({"forgets": 3}, "does not divide the context, 20")):
        with pytest.raises(ValueError, match=said):
            by_position(build("M", torch.float32), tokens, 20, **changes)


class Copies:
    """Stands for a model that answers what was said behind the last place in its context that is like the end."""

    def __init__(self, knows):
        from moemamba import preset

        self.knows, self.config = knows, preset("mamba-tiny").replace(vocab_size=257)
        self.embedding = torch.nn.Embedding(1, 1)
        self.read = {}

    def backbone(self, tokens, state, record=None):
        rows = tokens.tolist() if state is None else [[*a, *b] for a, b in zip(state, tokens.tolist(), strict=True)]
        hidden = torch.zeros(*tokens.shape, 257)
        for number, row in enumerate(rows):
            for place in range(len(row) - tokens.shape[1], len(row)):
                hidden[number, place - len(row), self.next(row[: place + 1])] = 20.0
        return hidden, rows, ()

    def next(self, row):
        end = row[-6:]
        start = max(0, len(row) - self.knows)
        for place in range(len(row) - 7, start + 5, -1):
            if row[place - 5 : place + 1] == end:
                return row[place + 1]
        return 0

    def head(self, hidden):
        return hidden


@pytest.mark.parametrize("task", TASKS)
def test_recall_is_of_what_was_said_so_long_ago(task):
    """A reader that copies recalls facts within its reach, and none beyond; by pieces as at once."""
    filler = Tokens(
        np.frombuffer(b"so it was, and so it is. " * 400, np.uint8).astype(np.uint16), np.array([10_000]), 1
    )
    model = Copies(knows=150)
    for piece in (33, 4096):
        near, far = recall(model, BYTES, filler, task, [80, 300], trials=4, batch_size=3, piece=piece)
        assert (near.accuracy, far.accuracy) == (1.0, 0.0)
        assert near.loss < 0.01 < near.gain and far.gain == pytest.approx(0, abs=2.0)
        assert near.trials == 4 and near.accuracy_error == 0
    with pytest.raises(ValueError, match="there is no task 'pass'"):
        recall(model, BYTES, filler, "pass", [80])
    with pytest.raises(ValueError, match="less than the question's"):
        recall(model, BYTES, filler, task, [2])


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_its_fact_where_it_says(task):
    filler = Tokens(np.full(5000, 46, np.uint16), np.array([5000]), 1)
    drawn = np.random.default_rng(3)
    prompt = _prompt(TASKS[task], BYTES, filler, 200, drawn)
    text, other = BYTES.decode(prompt.told), BYTES.decode(prompt.mistold)
    value = text[-5:]
    assert value.isdigit() and len(prompt.told) == len(prompt.mistold) == FRONT + 200 + prompt.size
    end = text.rindex("\n", 0, len(text) - 200)  # of the fact
    assert len(text) - prompt.size - (end + 1) == 200 and value in text[:end]
    assert value not in other[:-6] and other[-6:] == text[-6:]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for k in range(25):
        (text / f"{k}.txt").write_text("".join(f"{k} plus {j} is {k + j}\n" for j in range(60)))
    model = build("E", torch.float32).config.replace(vocab_size=257, pattern="ME")
    config = TrainConfig(model, str(text), run=str(tmp_path / "run"), steps=2, batch_size=2, context=32)
    train(config, report=Report(silent=True))
    where = [str(tmp_path / "run"), "--data", str(text), "--json"]
    capsys.readouterr()
    run(["eval", *where, "--by-position", "--context", "256", "--since", "32", "--forgets", "32", "--tokens", "2048"])
    found = json.loads(capsys.readouterr().out)
    assert (found["length"], found["sequences"], found["documents"]) == (256, 8, 8)
    assert found["bins"][-1]["first"] == 129 and len(found["routers"]) == 2
    run(["eval", *where, "--recall", "--context", "256", "--trials", "2"])
    found = json.loads(capsys.readouterr().out)
    assert {name: [each["distance"] for each in own] for name, own in found["tasks"].items()} == {
        name: [64, 256] for name in TASKS
    }
    run(["eval", *where[:-1], "--by-position", "--context", "64", "--since", "8"])
    shown = capsys.readouterr().out
    assert "tokens before" in shown and "minus that of 5 to 8" in shown and "routing" in shown
    run(["eval", *where[:-1], "--recall", "--context", "64", "--trials", "2"])
    assert "passkey, 2 trials each" in capsys.readouterr().out
    for words, said in (
        (["--by-position", "--recall"], "one at a time"),
        (["--since", "5"], "--since goes with --by-position"),
    ):
        with pytest.raises(ValueError, match=said):
            run(["eval", *where, *words])
