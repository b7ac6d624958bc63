"""Tokenizers: what goes in comes out, on disk and as a stream too."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from moemamba.text import ByteTokenizer, StreamDecoder, load_tokenizer, train_bpe

TEXT = "def f(x):\n\treturn x  # π ≈ 3,14 — naïve 🐍👩‍🔬\r\n\0 <|endoftext|> 日本語"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["the snake in the grass, the snake in the boat", "def f(x):\n    return x"] * 20, 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.end_of_text not in ids, "text that spells the mark is text"
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == TEXT
    assert max(ids) < tokenizer.vocab_size and tokenizer.end_of_text < tokenizer.vocab_size


def test_batch_equals_one_by_one(tokenizer):
    texts = [TEXT, "", "x", TEXT * 3]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_bytes_are_utf8():
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_bpe_merges(bpe):
    assert len(bpe.encode("the snake")) < 4
    assert bpe.vocab_size <= 300


def test_saved_and_loaded(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert type(loaded) is type(tokenizer)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.to_json() == tokenizer.to_json()


def test_other_programs_read_the_byte_tokenizer():
    plain = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    text = TEXT.replace("<|endoftext|>", "")
    assert plain.encode(text).ids == list(text.encode())
    assert plain.decode(list(text.encode())) == text
    assert plain.token_to_id("<|endoftext|>") == 256


def test_gpt2_layout(bpe, tmp_path):
    model = json.loads(bpe.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)


def test_stream_never_shows_half_a_character(tokenizer):
    text = TEXT.replace("<|endoftext|>", "")
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text and decoder.finish() == ""


def test_stream_of_bytes_that_are_not_text():
    ids = np.random.default_rng(0).integers(0, 257, 500).tolist()
    decoder = StreamDecoder(ByteTokenizer())
    shown = "".join(decoder.push(token) for token in ids) + decoder.finish()
    ascii_only = [c for c in ByteTokenizer().decode(ids) if c < "\x80"]
    assert [c for c in shown if c < "\x80"] == ascii_only, "garbage must not swallow what follows"


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere.*bytes"):
        load_tokenizer(tmp_path / "nowhere")
    broken = tmp_path / "tokenizer.json"
    broken.write_text(ByteTokenizer().to_json()[:500])
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be used as a tokenizer"):
        load_tokenizer(tmp_path)
    broken.write_text(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str())
    with pytest.raises(ValueError, match="no token that ends a document"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size is 100.*257"):
        train_bpe(["text"], 100)


def test_needs_no_torch():
    program = "import sys, moemamba.text, moemamba.training.config; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_former_name_warns():
    import moemamba.tokenizer as former

    with pytest.warns(DeprecationWarning, match="import load_tokenizer from there"):
        assert former.load_tokenizer("bytes").vocab_size == 257
    with pytest.raises(AttributeError):
        former.nothing  # noqa: B018
    import moemamba.training.progress as former_progress
    from moemamba.host.progress import Report

    with pytest.warns(DeprecationWarning, match="import Report from there"):
        assert former_progress.Report is Report
