"""Texts from parquet, compressed JSON lines and a hub; and the paper's sampling of documents."""

import errno
import gzip
import io
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moemamba
from moemamba import TrainConfig, train
from moemamba.data.batches import Batches, SampledDocuments, Tokens, Windows
from moemamba.data.documents import Documents
from moemamba.data.preparation import prepare
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def test_parquet_and_compressed_lines_in_a_folder(tmp_path):
    texts = [f"document {k}" for k in range(8)]
    write_parquet(tmp_path / "a.parquet", text=[*texts, "", None], id=list(range(10)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"text": "zipped"}\n')
    (tmp_path / "c.txt").write_text("plain")
    documents = Documents(tmp_path)
    assert list(documents) == [*texts, "zipped", "plain"]
    assert not documents.skipped


def test_parquet_without_text_says_what_there_is(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(ValueError, match=r'a.parquet has no column "text"; it has body, id'):
        list(Documents(tmp_path / "a.parquet"))


def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path):
    write_parquet(tmp_path / "numbers.parquet", text=[1, 2])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "x"}')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-9])
    (tmp_path / "other.jsonl").write_text('{"body": "x"}')
    for name, said in {
        "numbers.parquet": 'has a column "text" of int64',
        "torn.parquet": "is not a parquet file",
        "plain.jsonl.gz": "is not a complete gzip file",
        "cut.jsonl.gz": "is not a complete gzip file",
        "other.jsonl": "line 1: .* it has body",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}.* ?{said}"):
            list(Documents(tmp_path / name))


def hub(monkeypatch, examples):
    """In the place of `datasets`; returns what it was asked for."""
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such dataset")
        return iter(examples)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    def endless():
        number = 0
        while True:
            yield {"text": f"text {number}", "url": "x"}
            number += 1

    asked = hub(monkeypatch, endless())
    assert list(Documents("hf:allenai/c4:en:train:3")) == ["text 0", "text 1", "text 2"]
    assert asked == [("allenai/c4", "en", "train", True)]
    corpus = prepare("hf:some/text:::500", ByteTokenizer(), tmp_path)
    assert asked[1] == ("some/text", None, "train", True)
    assert len(corpus.train.ends) + len(corpus.validation.ends) == 500
    prepare("hf:some/text:::500", ByteTokenizer(), tmp_path)
    assert len(asked) == 2  # from the cache


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "does not name a dataset; write hf:NAME"),
        ("hf:a:b:c:many", "does not name a dataset"),
        ("hf:nobody/nothing", "hf:nobody/nothing cannot be read: no such dataset"),
        ("hf:a/b", 'hf:a/b, example 0, has no string "text"; it has body'),
    ],
)
def test_what_is_wrong_with_a_dataset(monkeypatch, source, message):
    hub(monkeypatch, [{"body": "x"}])
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        list(Documents(source))


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:a/b needs the package datasets: pip install 'moemamba\[data\]'"):
        list(Documents("hf:a/b"))


def numbered(lengths):
    """Token ids 1000 d + place, so that each says where it comes from."""
    ids = np.concatenate([1000 * d + np.arange(length) for d, length in enumerate(lengths)])
    return Tokens(ids.astype(np.uint32), np.cumsum(lengths).astype(np.int64), 0)


def test_sampled_rows_are_documents_end_to_end():
    lengths = [5, 1, 30, 12, 100, 7, 2]
    tokens = numbered(lengths)
    batches = Batches(SampledDocuments(tokens, 40, seed=3), 8)
    started = set()
    for step in range(30):
        batch = batches[step]
        assert batch.seq_idx is None
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for row in torch.cat([batch.tokens[:, :1], batch.targets], 1).tolist():
            started.add(row[0] // 1000)
            for before, after in itertools.pairwise(row):
                if before % 1000 == lengths[before // 1000] - 1:
                    assert after % 1000 == 0  # a document ended, so another begins, perhaps around the end
                else:
                    assert after == before + 1
    assert len(started) >= 5  # rows begin inside all kinds of documents


def test_sampled_rows_are_a_function_of_seed_and_step():
    tokens = numbered([5, 1, 30, 12, 100, 7, 2])
    whole = Batches(SampledDocuments(tokens, 16, seed=1), 6)
    assert torch.equal(whole[4].tokens, Batches(SampledDocuments(tokens, 16, seed=1), 6)[4].tokens)
    assert not torch.equal(whole[4].tokens, Batches(SampledDocuments(tokens, 16, seed=2), 6)[4].tokens)
    assert not torch.equal(whole[4].tokens, whole[5].tokens)
    assert not torch.equal(whole[4].tokens, Batches(Windows(tokens, 16, seed=1), 6)[4].tokens)
    ranks = [Batches(SampledDocuments(tokens, 16, seed=1), 2, rank=rank, world_size=3) for rank in range(3)]
    assert torch.equal(whole[4].tokens, torch.cat([rank[4].tokens for rank in ranks]))


def test_documents_are_drawn_alike_whatever_their_length():
    """How often a document begins in a row: drawn by their tokens, long ones would do so four times as often."""
    lengths = [10] * 5 + [40] * 5
    batches = Batches(SampledDocuments(numbered(lengths), 64, seed=0), 16)
    rows = torch.cat([batches[step].targets for step in range(100)]).flatten()
    begins = torch.bincount(rows[rows % 1000 == 0] // 1000, minlength=10).float()
    assert begins[:5].sum() / begins[5:].sum() == pytest.approx(1, abs=0.1)


def test_a_run_samples_documents_and_resumes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k}: {k * k}\n" for k in range(2000)))
    config = TrainConfig(
        data=str(text), run=str(tmp_path / "whole"), steps=4, batch_size=2, context=16, sampling="documents",
        eval_every=4, eval_tokens=64, save_every=2, log_every=1, device="cpu",
    )  # fmt: skip
    whole = train(config, report=Report(silent=True))
    parts = TrainConfig(**{**vars(config), "run": str(tmp_path / "parts")})
    train(parts, stop=2, report=Report(silent=True))
    resumed = train(parts, resume=True, report=Report(silent=True))
    assert resumed.evaluation == whole.evaluation
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_resets_do_not_go_with_sampled_documents():
    with pytest.raises(ValueError, match='reset_state goes with sampling = "windows" alone'):
        TrainConfig(sampling="documents", reset_state=True)


class FailingDisk:
    """Of all reads of files below a folder, the one of this number fails."""

    def __init__(self, folder, number):
        self.folder, self.left, self.failed, self.open = folder, number, None, Path.open

    def opening(self):
        def opened(path, *how, **named):
            stream = self.open(path, *how, **named)
            return io.BufferedReader(_Read(stream, path, self), 256) if self.folder in path.parents else stream

        return opened


class _Read(io.RawIOBase):
    def __init__(self, stream, path, disk):
        self.stream, self.path, self.disk = stream, path, disk

    def readable(self):
        return True

    def readinto(self, buffer):
        self.disk.left -= 1
        if self.disk.left == 0:
            self.disk.failed = self.path
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.stream.readinto(buffer)

    def close(self):
        self.stream.close()
        super().close()


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json", "u16.bin", "utf16.txt"])
def test_what_cannot_be_read_is_not_said_to_be_written(kind, tmp_path, monkeypatch):
    """Whichever read fails: of the name, the head, the size or the text, in a file alone or in a folder."""
    text = "one line and another\n" * 100
    content = {
        "txt.gz": gzip.compress(text.encode()),
        "jsonl": b'{"text": "a text"}\n' * 100,
        "json": json.dumps([{"text": "a text"}] * 100).encode(),
        "u16.bin": np.array([*b"some text", 256] * 100, "<u2").tobytes(),
        "utf16.txt": text.encode("utf-16"),
    }.get(kind, text.encode())
    source = tmp_path / "source"
    source.mkdir()
    (source / f"a.{kind}").write_bytes(content)
    number = failures = 0
    while True:
        number += 1
        disk, cache = FailingDisk(source, number), tmp_path / f"cache-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", disk.opening())
            try:
                prepare(source if number % 2 else source / f"a.{kind}", ByteTokenizer(), cache)
                break
            except OSError as error:
                assert str(error) == f"cannot read {disk.failed}: {os.strerror(errno.EIO)}; " + (
                    "make it readable, or name another"
                )
        failures += 1
        assert not list(cache.iterdir())
    assert failures > 3


def test_what_a_caller_cannot_read_is_his(tmp_path):
    def documents():
        yield "a text"
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    with pytest.raises(OSError, match="cannot read documents from Python: connection reset"):
        moemamba.prepare(documents(), tmp_path / "tokens")
