"""Folders of tokens that others made or that were damaged: opened with every number within bounds, or one sentence."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
from documents import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba.data import prepared
from moemamba.data.batches import Batches, SampledDocuments, Windows
from moemamba.data.preparation import prepare
from moemamba.text import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
VALUES = JSON | st.sampled_from(["O", "<f8", "<i1", ">u2", "<u4", "|V1", 0, -1, -5, 1 << 62, 1 << 64, 1e308, 2.0])
KEYS = ["tokens", "documents", "bytes", "dtype", "content", "spelled"]
NUMBERS = [0, 1, 255, 256, 257, 65535, -1, 2**31, 2**60, -(2**63)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small folder of tokens."""
    root = tmp_path_factory.mktemp("prepared")
    write_folder(root / "in", 60)
    prepare(str(root / "in"), BYTES, root / "cache")
    (made,) = (path for path in (root / "cache").iterdir() if (path / "index.json").exists())
    return made


def opens(folder):
    """Whether a folder opens; then whatever is read of it must be tokens, and soon. Anything else is one sentence."""
    try:
        corpus = prepare(str(folder), BYTES, folder.parent / "cache")
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 600, str(error)[:200]
        return False
    for rows in (Windows, SampledDocuments):
        batch = Batches(rows(corpus.train, 16, 0), 4)[3]
        assert batch.tokens.min() >= 0 and max(batch.tokens.max(), batch.targets.max()) < BYTES.vocab_size
    assert min(corpus.train.bytes, len(corpus.train.ends)) > 0
    return True


def copied(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("mutant") / "tokens"
    shutil.copytree(folder, made)
    return made


def mutate_bytes(rng, folder):
    """Cut, lengthen, or change a file of tokens or of ends, or remove it."""
    file = folder / rng.choice(["train.bin", "train.ends", "validation.bin", "validation.ends", "index.json"])
    content = bytearray(file.read_bytes())
    way = rng.randrange(6)
    if way == 0:
        del content[rng.randrange(len(content) + 1) :]
    elif way == 1:
        content += rng.randbytes(rng.choice([1, 2, 8, 64]))
    elif way == 2:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 3:
        content[:] = struct.pack("<q", rng.choice(NUMBERS)) * (len(content) // 8)
    elif way == 4:
        at = rng.randrange(max(1, len(content) // 8)) * 8
        content[at : at + 8] = struct.pack("<q", rng.choice(NUMBERS))
    file.write_bytes(content)
    if way == 5:
        file.unlink()


def test_it_opens_as_it_is(folder, tmp_path_factory):
    assert opens(copied(folder, tmp_path_factory))


def test_any_index_opens_or_is_refused_in_a_sentence(folder, tmp_path_factory):
    made = copied(folder, tmp_path_factory)
    index = json.loads((made / "index.json").read_text())

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from([None, *index]), st.sampled_from([None, *KEYS]), VALUES, st.booleans())
    def look(key, inner, value, remove):
        changed = json.loads(json.dumps(index))
        place = changed[key] if key in ("train", "validation") and inner else changed
        name = inner if place is not changed else key
        if name is None:
            changed = value
        elif remove:
            place.pop(name, None)
        else:
            place[name] = value
        (made / "index.json").write_text(json.dumps(changed))
        opens(made)

    look()


def test_any_bytes_open_or_are_refused_in_a_sentence(folder, tmp_path_factory):
    rng, opened = random.Random(0), 0
    made = copied(folder, tmp_path_factory)
    for _ in range(1000):
        mutate_bytes(rng, made)
        opened += opens(made)
        shutil.rmtree(made)
        shutil.copytree(folder, made)
    assert 20 < opened < 400  # most mutants do harm, and some do none


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "O"}, "dtype is 'O'; expected one of '<u2', '<u4'"),
        ({"tokens": 7000}, "train.bin has [0-9,]+ bytes in place of 14,000"),
        ({"bytes": 0}, "cannot have 0 bytes"),
        ({"bytes": -5}, "bytes is -5; it must be 0 or more"),
        ({"documents": 0}, "0 documents cannot have"),
    ],
)
def test_an_index_that_does_not_fit_says_what(folder, tmp_path_factory, change, said):
    made = copied(folder, tmp_path_factory)
    index = json.loads((made / "index.json").read_text())
    index["train"] |= change
    (made / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        prepare(str(made), BYTES, made.parent / "cache")


@pytest.mark.parametrize("value", [0, -1, 1 << 60])
def test_ends_that_are_none(folder, tmp_path_factory, value):
    made = copied(folder, tmp_path_factory)
    ends = np.fromfile(made / "train.ends", "<i8")
    np.full_like(ends, value).tofile(made / "train.ends")
    with pytest.raises(ValueError, match=r"train\.ends does not hold rising ends of documents"):
        prepare(str(made), BYTES, made.parent / "cache")


def test_a_token_beyond_the_vocabulary(folder, tmp_path_factory):
    made = copied(folder, tmp_path_factory)
    ids = np.fromfile(made / "train.bin", "<u2")
    ids[5] = 300
    ids.tofile(made / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin holds the token 300, but the tokenizer has 257"):
        prepare(str(made), BYTES, made.parent / "cache")


def test_large_files_are_looked_at_once_until_they_change(folder, tmp_path_factory, monkeypatch):
    made, cache = copied(folder, tmp_path_factory), tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(prepared, "REMEMBERED", 1)
    looked, fault = [], prepared._fault
    monkeypatch.setattr(prepared, "_fault", lambda *args: (looked.append(1), fault(*args))[1])
    for _ in range(3):
        prepare(str(made), BYTES, cache)
    assert len(looked) == 2
    (made / "train.bin").write_bytes((made / "train.bin").read_bytes())
    prepare(str(made), BYTES, cache)
    assert len(looked) == 4


def test_a_folder_half_gone_is_never_read_as_text(folder, tmp_path_factory):
    for name in ("train.bin", "train.ends", "index.json", "validation.bin"):
        made = copied(folder, tmp_path_factory)
        (made / name).unlink()
        with pytest.raises(ValueError, match=rf"are incomplete; .*{name} is missing"):
            prepare(str(made), BYTES, made.parent / "cache")


def test_a_pipe_in_place_of_a_file(folder, tmp_path_factory):
    import os

    made = copied(folder, tmp_path_factory)
    (made / "validation.bin").unlink()
    os.mkfifo(made / "validation.bin")
    with pytest.raises(ValueError, match="is not a regular file"):
        prepare(str(made), BYTES, made.parent / "cache")


def test_the_same_tokenizer_written_in_another_way(tmp_path):
    """A later version of the library may write a tokenizer.json otherwise: the tokens are still its own."""
    tokenizer = train_bpe(["some words here"] * 9, 300)
    write_folder(tmp_path / "in", 60)
    prepare(str(tmp_path / "in"), tokenizer, tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    index = json.loads((made / "index.json").read_text())
    (made / "index.json").write_text(json.dumps(index | {"tokenizer": "0" * 24}))
    assert len(prepare(str(made), tokenizer, tmp_path / "cache").train.ids) == index["train"]["tokens"]
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        prepare(str(made), train_bpe(["other text"] * 9, 299), tmp_path / "cache")
