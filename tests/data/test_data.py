"""From text to batches: nothing lost, nothing stale, and every batch a pure function of its step."""

import json
import os

import numpy as np
import pytest
import torch
from documents import fake_tokens, texts_of, write_folder

from moemamba import TrainConfig
from moemamba.data import preparation
from moemamba.data.batches import Batches, Windows, permute
from moemamba.data.corpora import open_corpora
from moemamba.data.documents import Documents, is_held_out
from moemamba.data.preparation import HELD_OUT, cache_directory, prepare
from moemamba.data.windows import sequential
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()


# Documents


def test_folder_in_order_without_binaries(tmp_path):
    for name, content in {
        "b.txt": b"second",
        "a/z.py": "first π".encode(),
        "c.jsonl": b'{"text": "third"}\n\n{"text": ""}\n{"text": "fourth", "id": 3}\n',
        "0.bin": b"\x00\x01",
        "d.json": b'{"a": "json file is text here"}',
        "latin.txt": "é".encode("latin-1"),
        "empty.txt": b"",
        ".git/config": b"hidden",
        "__pycache__/x.pyc": b"cache",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = Documents(tmp_path)
    assert (
        list(documents)
        == list(documents)
        == ["first π", "second", "third", "fourth", '{"a": "json file is text here"}']
    )
    assert [file.name for file in documents.skipped] == ["0.bin", "latin.txt"]
    assert prepare(str(tmp_path), BYTES, tmp_path.parent / "cache").skipped == 2


def test_one_large_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {k} é\r\n" for k in range(20_000))
    (tmp_path / "t.txt").write_bytes(text.encode())
    parts = list(Documents(tmp_path / "t.txt"))
    assert "".join(parts) == text
    assert 90 <= len(parts) <= 101 and all(part.endswith("\n") for part in parts)


def test_marks_end_documents(tmp_path):
    (tmp_path / "t.txt").write_text("one\n<|endoftext|>\n<|endoftext|>\ntwo\nstill <|endoftext|> two\n")
    assert list(Documents(tmp_path / "t.txt")) == ["one\n", "two\nstill <|endoftext|> two\n"]


def test_line_longer_than_a_block(tmp_path):
    text = "é" * 1_500_000  # 3 MB without a line end; a block ends inside a character's neighbour
    (tmp_path / "t.txt").write_bytes(b"x" + text.encode())
    assert "".join(Documents(tmp_path / "t.txt")) == "x" + text


@pytest.mark.parametrize("before", [0, 3, (1 << 20) - 1, 3 << 20])
def test_not_utf8_names_file_and_byte(tmp_path, before):
    (tmp_path / "t.txt").write_bytes(b"a" * before + "é".encode() + b"\xff\n")
    with pytest.raises(ValueError, match=rf"t\.txt is not UTF-8 text: byte {before + 2} .*iconv"):
        list(Documents(tmp_path / "t.txt"))


def test_text_that_ends_inside_a_character(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"abc\n\xc3")
    with pytest.raises(ValueError, match="byte 4 "):
        list(Documents(tmp_path / "t.txt"))


@pytest.mark.parametrize("line", ['{"txt": "x"}', '{"text": 3}', '["text"]', "{", '"text"', b'{"text": "\xff"}'])
def test_json_lines_name_the_line(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r't\.jsonl, line 2: .*"text"'):
        list(Documents(tmp_path / "t.jsonl"))


def test_standard_library():
    documents = Documents(None)
    names = [file.name for file in documents.files]
    assert "dataclasses.py" in names and len(names) > 300 and documents.bytes > 5e6
    assert not any({"test", "site-packages"} & set(file.parts) for file in documents.files)
    assert documents.fingerprint() == Documents(None).fingerprint()


def test_missing_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere"):
        Documents(tmp_path / "nowhere")


# Tokens on disk


def test_every_document_is_kept_once(tmp_path):
    texts = write_folder(tmp_path / "in")
    corpus = prepare(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    assert texts_of(corpus.train) == [text for text in texts if not is_held_out(text.encode(), HELD_OUT)]
    assert texts_of(corpus.validation) == [text for text in texts if is_held_out(text.encode(), HELD_OUT)]
    assert 2 <= len(corpus.validation.ends) <= 25
    assert corpus.train.bytes + corpus.validation.bytes == sum(len(text.encode()) for text in texts)
    assert corpus.train.ids.dtype == np.uint16


def test_a_document_stays_on_its_side(tmp_path):
    texts = write_folder(tmp_path / "in")
    small = prepare(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    for k in range(0, 200, 2):
        (tmp_path / "in" / f"{k:04d}.txt").unlink()
    (tmp_path / "in" / "new.txt").write_text("new")
    smaller = prepare(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    assert set(texts_of(smaller.validation)) - {"new"} <= set(texts_of(small.validation)) and len(texts) == 200


def test_large_vocabulary_takes_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        end_of_text = 69_999

    write_folder(tmp_path / "in")
    corpus = prepare(str(tmp_path / "in"), Wide(), tmp_path / "cache")
    assert corpus.train.ids.dtype == np.uint32 and corpus.train.ids[corpus.train.ends[0] - 1] == 69_999


def test_cache_is_used_and_never_stale(tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"document {k}"}) for k in range(100)]
    source.write_text("\n".join(lines))
    write, seen = preparation._write, []
    monkeypatch.setattr(preparation, "_write", lambda *args: (seen.append(1), write(*args)))

    def count(tokenizer=BYTES):
        seen.clear()
        return prepare(str(source), tokenizer, tmp_path / "cache").content, bool(seen)

    first, read = count()
    assert read and count() == (first, False)
    stat = source.stat()
    source.write_text("\n".join(lines).replace("document 7", "dokument 7"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    changed, read = count()
    assert read and changed != first
    assert count(train_bpe(lines, 300))[1], "another tokenizer, other tokens"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_source_that_changes_while_it_is_read(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("line\n" * 1000)

    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            with source.open("a") as stream:
                stream.write("more\n")
            return super().encode_batch(texts)

    with pytest.raises(ValueError, match=r"in\.txt changed while it was read"):
        prepare(str(source), Slow(), tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_progress_of_tokenising(tmp_path):
    (tmp_path / "in.txt").write_text("line\n" * 1_000_000)
    seen = []
    prepare(str(tmp_path / "in.txt"), BYTES, tmp_path / "cache", show=lambda *shown: seen.append(shown))
    assert 4 <= len(seen) <= 5 and seen == sorted(seen) and seen[-1][0] <= seen[-1][1] == 5_000_000


def test_given_validation(tmp_path, monkeypatch):
    texts = write_folder(tmp_path / "in", 20)
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = TrainConfig(data=str(tmp_path / "in"), validation=str(tmp_path / "held.jsonl"), context=4)
    corpora = open_corpora(config.reads(), BYTES, Report(silent=True))
    assert texts_of(corpora.parts[0].train) == texts and texts_of(corpora.validation[0].tokens) == ["held out"]


def test_token_file(tmp_path):
    ids = np.concatenate([[*BYTES.encode(text), 256] for text in ("one π", "two", "three")])
    ids.astype("<u2").tofile(tmp_path / "t.bin")
    ids[:-3].astype("<u2").tofile(tmp_path / "v.bin")  # the last document without its mark
    corpus = prepare(str(tmp_path / "t.bin"), BYTES, tmp_path / "cache", 0)
    assert texts_of(corpus.train) == ["one π", "two", "three"] and corpus.train.bytes == 14
    assert texts_of(prepare(str(tmp_path / "v.bin"), BYTES, tmp_path / "cache", 0).train) == ["one π", "two", "thr"]
    (tmp_path / "odd.bin").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match=r"odd\.bin ends inside a token; it must hold uint16 tokens, 2 bytes each"):
        prepare(str(tmp_path / "odd.bin"), BYTES, tmp_path / "cache")
    (ids + 1).astype("<u2").tofile(tmp_path / "t.bin")
    with pytest.raises(ValueError, match=r"t\.bin holds the token 257, but the tokenizer has 257"):
        prepare(str(tmp_path / "t.bin"), BYTES, tmp_path / "cache")


def test_prepared_folder(tmp_path):
    write_folder(tmp_path / "in")
    corpus = prepare(str(tmp_path / "in"), BYTES, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    again = prepare(str(folder), BYTES, tmp_path / "elsewhere")
    assert again.content == corpus.content and texts_of(again.train) == texts_of(corpus.train)
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(str(folder), train_bpe(["text"], 300), tmp_path / "elsewhere")
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"incomplete; remove that folder"):
        prepare(str(tmp_path / "in"), BYTES, tmp_path / "cache")


@pytest.mark.parametrize("name", ["empty.txt", "folder"])
def test_no_text(tmp_path, name):
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "binary").write_bytes(b"\0")
    else:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"there is no text in .*{name}"):
        prepare(str(tmp_path / name), BYTES, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(tmp_path / "run") == tmp_path / "xdg" / "moemamba"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_directory(tmp_path / "run") == tmp_path / "run"


# Batches


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_permutation(size):
    places = np.arange(size, dtype=np.uint64)
    orders = [permute(places, size, np.full(size, key, np.uint64)).tolist() for key in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 60:
        assert orders[0] != orders[1] != orders[2]
        assert np.abs(np.corrcoef(orders[0], np.arange(size))[0, 1]) < 0.35


def test_an_epoch_reads_every_window_once():
    tokens = fake_tokens([101])
    batches = Batches(Windows(tokens, 4, seed=7), 3)
    assert batches.rows.windows == 25
    order = np.concatenate([batches.chosen(step) for step in range(25)])
    first, second, third = order.reshape(3, 25)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(25))
    assert list(first) != list(second) != list(third)


def test_batch_is_a_function_of_the_step():
    tokens = fake_tokens([1001])
    one, other = Batches(Windows(tokens, 16, seed=1), 4), Batches(Windows(tokens, 16, seed=1), 4)
    later = other[9]
    for step in (0, 5, 9):
        assert torch.equal(one[step].tokens, other[step].tokens)
    assert torch.equal(one[9].targets, later.targets)
    assert not torch.equal(one[0].tokens, one[1].tokens)
    assert not torch.equal(one[0].tokens, Batches(Windows(tokens, 16, seed=2), 4)[0].tokens)


def test_targets_are_the_next_tokens():
    tokens = fake_tokens([1001])
    batches = Batches(Windows(tokens, 16, seed=1), 4)
    batch = batches[3]
    for row, window in enumerate(batches.chosen(3)):
        assert batch.tokens[row].tolist() == tokens.ids[window * 16 : window * 16 + 16].tolist()
        assert batch.targets[row].tolist() == tokens.ids[window * 16 + 1 : window * 16 + 17].tolist()
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.seq_idx is None


def test_ranks_share_the_batch():
    tokens = fake_tokens([1001])
    whole = Batches(Windows(tokens, 16, seed=1), 6)
    ranks = [Batches(Windows(tokens, 16, seed=1), 2, rank=rank, world_size=3) for rank in range(3)]
    for step in range(12):
        assert torch.equal(whole[step].tokens, torch.cat([batches[step].tokens for batches in ranks]))


def test_seq_idx_counts_documents():
    tokens = fake_tokens([5, 1, 9, 30, 2, 2, 20])
    batches = Batches(Windows(tokens, 8, seed=0, reset_state=True), 2)
    for step in range(batches.rows.windows):
        batch = batches[step]
        for row, ids in enumerate(batch.tokens.tolist()):
            expected, document = [], 0
            for token in ids:
                expected.append(document)
                document += token == 256
            assert batch.seq_idx[row].tolist() == expected


def test_sequential_pass():
    tokens = fake_tokens([100])
    read = [batch.tokens for batch in sequential(tokens, batch_size=4, context=9)]
    assert [len(part) for part in read] == [4, 4, 3]
    assert torch.cat(read).flatten().tolist() == tokens.ids[:99].tolist()
    assert sum(batch.tokens.numel() for batch in sequential(tokens, 4, 9, most=50)) == 45
    some = torch.cat([batch.tokens for batch in sequential(tokens, 4, 9, most=50)])
    whole = torch.cat(read)
    assert torch.equal(some, whole[torch.arange(5) * len(whole) // 5])  # spread over the text


def test_too_short():
    with pytest.raises(ValueError, match="has 16 tokens, but one window needs 17"):
        Batches(Windows(fake_tokens([16]), 16, seed=0), 1)
    assert Batches(Windows(fake_tokens([17]), 16, seed=0), 3)[5].tokens.shape == (3, 16)
    with pytest.raises(ValueError, match="validation data has 16 tokens"):
        next(sequential(fake_tokens([16]), 1, 16))
