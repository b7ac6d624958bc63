"""One table of kinds and packings: the same documents under every name are the same training data, or one sentence."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from documents import texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba.data.documents import Documents
from moemamba.data.preparation import prepare
from moemamba.host.files import FileError
from moemamba.text import ByteTokenizer

BYTES = ByteTokenizer()
TEXTS = [f"document {k}, é and π, \U0001f600" + "\nof two lines" * (k % 3) for k in range(120)]


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def lines(texts, ascii_only=True):
    return "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=ascii_only) + "\n" for text in texts)


def parquet(texts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as format_

    sink = pyarrow.BufferOutputStream()
    format_.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), sink)
    return sink.getvalue().to_pybytes()


def tokens(texts, dtype):
    return np.concatenate([[*BYTES.encode(text), 256] for text in texts]).astype(dtype).tobytes()


def records(texts):
    """Every way to write documents: name and content."""
    plain = lines(texts, False)
    return {
        "a.jsonl": plain.encode(),
        "a.ndjson": lines(texts).encode(),
        "a.json": plain.encode(),
        "array.json": json.dumps([{"text": text} for text in texts]).encode(),
        "pretty.json": json.dumps([{"n": {"m": [1]}, "text": text} for text in texts], indent=2).encode(),
        "objects.json": "\n".join(json.dumps({"text": text}, indent=1) for text in texts).encode(),
        "part-00000": plain.encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + plain.encode(),
        "windows.jsonl": plain.replace("\n", "\r\n").encode("utf-16"),
        "big.jsonl": plain.encode("utf-16-be"),
        "little.jsonl": lines(texts).encode("utf-16-le"),
        "32.jsonl": plain.encode("utf-32"),
        "a.parquet": parquet(texts),
        "b": parquet(texts),
        "a.u16.bin": tokens(texts, "<u2"),
        "a.bin": tokens(texts, "<u2"),
        "a.u32.bin": tokens(texts, "<u4"),
        "a.u32": tokens(texts, "<u4"),
    }


def content_of(source, tmp_path):
    return prepare(str(source), BYTES, tmp_path / "cache").content


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", records(["x"]))
def test_the_same_documents_under_every_name(tmp_path, name, packing):
    """Alone, with a name in capitals, and in a folder: the same training tokens."""
    (tmp_path / "plain.jsonl").write_text(lines(TEXTS))
    wanted = content_of(tmp_path / "plain.jsonl", tmp_path)
    content = PACK[packing](records(TEXTS)[name])
    (tmp_path / "folder").mkdir()
    for file in (
        tmp_path / (name + packing),
        tmp_path / (name + packing).upper(),
        tmp_path / "folder" / (name + packing),
    ):
        file.write_bytes(content)
        assert content_of(file.parent if file.parent.name == "folder" else file, tmp_path) == wanted, file


@pytest.mark.parametrize("packing", list(PACK)[1:])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_same_text_in_every_encoding_and_packing(tmp_path, packing, encoding):
    """The name need not tell of a packing."""
    text = "\n".join(TEXTS * 9)
    (tmp_path / "t.txt").write_bytes(text.encode())
    wanted = prepare(str(tmp_path / "t.txt"), BYTES, tmp_path / "cache")
    assert len(wanted.train.ends) > 20
    for name in (f"T.TXT{packing}", "log", f"page.html{packing}"):
        (tmp_path / name).write_bytes(PACK[packing](text.encode(encoding)))
        assert content_of(tmp_path / name, tmp_path) == wanted.content


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("text " * 400)
    (folder / "z.zip").write_bytes(b"PK\x03\x04 and more")
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "other.jsonl.json").write_text('{"body": "x"}\n{"body": "y"}\n')
    (folder / "gone").symlink_to("nowhere")
    (folder / "tokens.bin").write_bytes(b"\1\0\2\0")
    os.mkfifo(folder / "pipe")
    corpus = prepare(str(folder), BYTES, tmp_path / "cache")
    assert corpus.skipped == 6
    said = " ".join(corpus.notes)
    for name in (
        "gone cannot be read (No such file",
        "pipe is not a regular file",
        "z.zip is a zip archive",
        "tokens.bin",
    ):
        assert name in said, said
    assert "6 left out" in said and "and 1 more" in said
    with pytest.raises(ValueError, match=r"zero\.txt is not text: byte 1 is zero"):
        prepare(str(folder / "zero.txt"), BYTES, tmp_path / "cache")


def test_folders_that_are_links_are_read_once(tmp_path):
    for name in ("disk/deep", "in/own"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "far.txt").write_text("far")
    (tmp_path / "in" / "own" / "near.txt").write_text("near")
    (tmp_path / "in" / "aside").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "again").symlink_to("own")
    (tmp_path / "disk" / "circle").symlink_to(tmp_path / "in")
    documents = Documents(tmp_path / "in")
    assert list(documents) == ["far", "near"]
    assert sorted(file.name for file in documents.skipped) == ["again", "circle"]


def test_half_a_character_is_mended_and_null_is_nothing(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "cut \\ud83d"}\n{"text": ""}\n')
    documents = Documents(tmp_path / "t.jsonl")
    assert list(documents) == ["a", "cut \ufffd"]
    assert documents.mended == [(tmp_path / "t.jsonl", 1, "line 3")]
    assert "t.jsonl: 1 documents held half a character" in documents.notes()[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"body": 1}\n{"body": 2}\n', 'JSON lines without a "text"; they have body'),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "is not whole JSON: it ends early"),
        ("a.json", b'[{"text": "a"}, 3]', "document 2: every document must be a JSON object"),
        ("a.json", b'[{"text": "a"}, {"text": ', "document 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "line 2: .* it is not JSON"),
        ("a.jsonl", b'{"text": ["a"]}\n', 'line 1: its "text" is a list'),
        ("a.jsonl", b"[" * 100_000, "line 1: .* nested too deeply"),
        ("a.jsonl.zst", b"no", "is not a complete zstd file"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "is not a complete gzip file"),
        ("a.xz", lzma.compress(os.urandom(99))[:-9], "is not a complete xz file"),
        ("a.bz2", b"", "is not a complete bzip2 file"),
        ("a.u32.bin", b"\1\0\0\0\2\0", "ends inside a token; it must hold uint32 tokens, 4 bytes each"),
        ("a.bin", np.array([217, 163, 131], "<u4").tobytes(), r"holds uint32 tokens, as it seems, .*\.u32\.bin"),
        ("a.bin", b"\x93NUMPY\1\0", "an array of numpy; write it with"),
        ("a.txt", "é".encode("utf-16") + b"\0\xd8", "begins as UTF-16-LE text, but byte 4 is none"),
        ("a.pdf", b"%PDF-1.4 x", "is a PDF; extract its text first"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_file_and_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=said) as raised:
        prepare(str(tmp_path / name), BYTES, tmp_path / "cache")
    assert name in str(raised.value)


NAMES = ["a", "t.txt", "T.JSONL", "a.json", "a.ndjson", "a.parquet", "a.bin", "a.u32.bin", "a.html", "x.csv"]


def mutant(rng):
    """A file that was whole once, or never: its name and content."""
    name, content = rng.choice(list(WHOLE.items()))
    if rng.random() < 0.3:
        name = rng.choice(NAMES)
    way = rng.randrange(4)
    if way == 0:
        content = rng.randbytes(rng.choice([0, 1, 2, 7, 40, 999]))
    elif way == 1:
        content = content[: rng.randrange(len(content) + 1)]
    content = bytearray(content)
    for _ in range(rng.randrange(3) if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    suffix = rng.choice(list(PACK))
    packed = bytearray(PACK[suffix](bytes(content)))
    if rng.random() < 0.2 and packed:
        packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
    return name + rng.choice([suffix, suffix, suffix, "", *PACK]), bytes(packed)


WHOLE = {}


def read_mutant(folder, name, content):
    """True if it is read; anything else is one sentence that names it."""
    file = folder / name
    file.write_bytes(content)
    try:
        assert all(isinstance(text, str) and text.encode() for text in Documents(file)) or True
        prepare(str(file), BYTES, folder / "cache")
        return True
    except ValueError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1, str(error)
        return False
    finally:
        file.unlink()


def test_any_file_is_read_or_refused_in_a_sentence(tmp_path):
    WHOLE.update(records(TEXTS[:9]))
    rng = random.Random(0)
    read = sum(read_mutant(tmp_path, *mutant(rng)) for _ in range(1000))
    assert 60 < read < 900


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8), st.sampled_from(NAMES[2:5])
)
def test_any_texts_survive_every_way_of_writing_them(tmp_path_factory, texts, name):
    folder = tmp_path_factory.mktemp("texts")
    ways = [lines(texts).encode(), lines(texts, False).encode("utf-16"), lines(texts).encode("utf-8-sig")]
    if name == "a.json":
        ways.append(json.dumps([{"text": text} for text in texts]).encode() if texts else b"")
    for content in ways:
        (folder / name).write_bytes(content)
        assert list(Documents(folder / name)) == [text for text in texts if text]


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".bz2"])
def test_an_endless_line_takes_bounded_memory(tmp_path, packing):
    """Of 200 MB, packed to nearly nothing or not."""
    file = tmp_path / f"t.jsonl{packing}"
    opened = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[packing]
    with opened(file, "wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(200):
            stream.write(b"a" * 1_000_000)
    program = (
        "import resource, sys; from moemamba.data.documents import Documents\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(Documents(sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    said, more = done.stdout.splitlines()
    assert "line 1 is longer than 32 MiB" in said and int(more) < 150


def test_text_without_line_ends_is_cut(tmp_path):
    rng = random.Random(0)
    (tmp_path / "dna.txt").write_text("".join(rng.choices("ACGT", k=300_000)))
    (tmp_path / "mac.txt").write_text("\r".join(f"some words in line {k}" for k in range(10_000)))
    for name in ("dna.txt", "mac.txt"):
        parts = list(Documents(tmp_path / name))
        assert "".join(parts) == (tmp_path / name).read_bytes().decode() and 90 <= len(parts) <= 101
        corpus = prepare(str(tmp_path / name), BYTES, tmp_path / "cache")
        assert len(corpus.train.ends) > 50 and len(corpus.validation.ends) >= 1
    assert all(part.endswith("\r") for part in list(Documents(tmp_path / "mac.txt"))[:-1])


def test_both_sides_have_text_where_that_can_be(tmp_path):
    for k in range(12):  # so few documents that often none would be held out
        (tmp_path / "t.jsonl").write_text(lines([f"{k} {n}" for n in range(4)]))
        corpus = prepare(str(tmp_path / "t.jsonl"), BYTES, tmp_path / "cache")
        assert len(corpus.train.ends) >= 1 and len(corpus.validation.ends) >= 1
    (tmp_path / "alike.jsonl").write_text(lines(["the same"] * 50))
    corpus = prepare(str(tmp_path / "alike.jsonl"), BYTES, tmp_path / "cache")
    assert len(texts_of(corpus.train)) == 50 and "nothing is held out, since all documents are alike" in corpus.notes[0]
