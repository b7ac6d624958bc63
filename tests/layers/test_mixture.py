"""Several corpora in one run: shares that hold at every row, epochs of each, one resumption."""

import dataclasses

import numpy as np
import pytest
import torch
from documents import fake_tokens

from moemamba import ModelConfig, TrainConfig, train
from moemamba.data.batches import Batches, Mixture, Windows
from moemamba.data.config import weighted
from moemamba.data.corpora import open_corpora
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer

BYTES = ByteTokenizer()


def test_weights_and_what_cannot_be_one():
    assert weighted(None) == ((None, None),)
    assert weighted("C:\\texts\\a.txt") == (("C:\\texts\\a.txt", None),)
    assert weighted("hf:allenai/c4:en:train:100000") == (("hf:allenai/c4:en:train:100000", None),)
    assert weighted(("7:C:\\a.txt", ".5:hf:a/b:en")) == (("C:\\a.txt", 7.0), ("hf:a/b:en", 0.5))
    assert weighted(("./1:2.txt", "b")) == (("./1:2.txt", None), ("b", None))
    for data, said in {
        ("0.7:a", "b"): "data gives no weight to b, but to others",
        ("0:a", "1:b"): "data is '0:a', whose weight is 0; write a number above 0",
        ("-1:a", "1:b"): "whose weight is -1;",
        ("7x:a", "1:b"): "whose weight is 7x;",
        ("1e999:a",): "whose weight is 1e999;",
        ("1:",): "whose weight is 1; write a number above 0, a colon and a text",
        (): "data names no text",
    }.items():
        with pytest.raises(ValueError, match=said):
            TrainConfig(data=data)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.2, 0.1), (1, 1, 1, 1, 1), (1000, 1), (1, 1000, 1e-9)])
def test_a_mixture_keeps_its_shares_and_every_epoch(shares):
    """Against counting one row after the other: each corpus's rows come once each, in order, in its share."""
    parts = [Windows(fake_tokens([length]), 8, seed=3) for length in (300, 81, 1001, 60, 77)[: len(shares)]]
    mixture = Mixture(parts, shares)
    chosen = mixture.chosen(np.arange(1500, dtype=np.uint64))
    seen = [0] * len(shares)
    for number, (corpus, window) in enumerate(chosen.tolist(), start=1):
        assert window == parts[corpus].chosen(np.array([seen[corpus]], np.uint64))[0]
        seen[corpus] += 1
        for count, share in zip(seen, shares, strict=True):
            assert abs(count - number * share / sum(shares)) < len(shares)
    assert min(seen[:2]) >= 1


def test_a_mixture_far_into_a_run():
    """At 2^43 rows too, a corpus's numbers follow each other without a gap."""
    mixture = Mixture([Windows(fake_tokens([90]), 8, seed=0)] * 3, (0.3, 0.3, 0.4))
    corpus, places = mixture._share(np.arange(2**43, 2**43 + 1000, dtype=np.uint64))
    for k in range(3):
        assert (np.diff(places[corpus == k]) == 1).all() and (corpus == k).sum() == pytest.approx(
            [300, 300, 400][k], abs=2
        )


def test_rows_of_a_mixture_are_those_of_its_corpora():
    corpora = [fake_tokens([5, 1, 9, 30, 2, 2, 20] * 3), fake_tokens([40] * 9)]
    parts = [Windows(tokens, 8, seed=1, reset_state=True) for tokens in corpora]
    whole = Batches(Mixture(parts, (2, 1)), 6)
    batch = whole[5]
    for row, (corpus, window) in enumerate(whole.chosen(5).tolist()):
        assert batch.tokens[row].tolist() == corpora[corpus].ids[window * 8 : window * 8 + 8].tolist()
        assert batch.targets[row].tolist() == corpora[corpus].ids[window * 8 + 1 : window * 8 + 9].tolist()
        document = np.searchsorted(corpora[corpus].ends, np.arange(window * 8, window * 8 + 8), side="right")
        assert batch.seq_idx[row].tolist() == (document - document[0]).tolist()
    ranks = [Batches(Mixture(parts, (2, 1)), 2, rank, 3) for rank in range(3)]
    for part in range(3):
        assert torch.equal(batch[part], torch.cat([batches[5][part] for batches in ranks]))


def test_a_run_mixes_corpora_and_resumes(tmp_path, monkeypatch, capsys):
    """Shares and epochs are said, held-out losses told apart, the end is the same; other weights are other data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, text in (("a.txt", "digits {k}: {k}{k}\n"), ("b.txt", "letters abc abc {k}\n")):
        (tmp_path / name).write_text("".join(text.format(k=k) for k in range(1000)))
    data = (f"3:{tmp_path / 'a.txt'}", f"1:{tmp_path / 'b.txt'}")
    config = TrainConfig(
        ModelConfig("ME", 1, 16), data, run=str(tmp_path / "whole"), steps=4, batch_size=4, context=16,
        eval_every=4, eval_tokens=512, save_every=2, log_every=1, device="cpu",
    )  # fmt: skip
    whole = train(config)
    said = capsys.readouterr().out
    assert "0.75 of the rows; " in said and "0.25 of the rows; " in said and "read 0.0" in said
    apart = whole.evaluation.apart
    assert list(apart) == [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert whole.evaluation.loss == pytest.approx(
        0.75 * apart[str(tmp_path / "a.txt")] + 0.25 * apart[str(tmp_path / "b.txt")]
    )
    parts = dataclasses.replace(config, run=str(tmp_path / "parts"))
    train(parts, stop=2, report=Report(silent=True))
    other = dataclasses.replace(parts, data=("2:" + data[0][2:], data[1]))
    with pytest.raises(ValueError, match=r"the training data of .* has changed"):
        train(other, resume=True, report=Report(silent=True))
    resumed = train(parts, resume=True, report=Report(silent=True))
    assert resumed.evaluation == whole.evaluation
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_without_weights_sizes_count(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, lines in (("a.txt", 6000), ("b.txt", 2000)):
        (tmp_path / name).write_text("".join(f"line {k}\n" for k in range(lines)))
    config = TrainConfig(data=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), context=8)
    corpora = open_corpora(config.reads(), BYTES, Report(silent=True))
    sizes = [len(part.train.ids) for part in corpora.parts]
    assert corpora.shares == pytest.approx([size / sum(sizes) for size in sizes])
    with pytest.raises(ValueError, match=r"the held-out text of .*a\.txt has .* tokens, but one window needs"):
        open_corpora(dataclasses.replace(config.reads(), context=3000), BYTES, Report(silent=True))
