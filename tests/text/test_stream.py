"""Text as it comes: for any ids of any tokenizer, the pieces together are what `decode` makes of all."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models

from moemamba.text import ByteTokenizer, StreamDecoder, TrainedTokenizer, UntilText, train_bpe

END = "</s>"
HIRAGANA = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ニャーニャー泣いていた事だけは記憶している。"
)
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0)]
LLAMA = ["▁hello", "▁world", "▁", "lo", "▁▁a", ",", "é", "<0x4", "<0x+A>", "<0xZZ>", " b", "\ufffd", *BYTES]
PIECES = ["hel", "##lo", "##", ".", "?", "n't", "##'s", "do", "not", "'", ",", "##ing", "[UNK]", "日", "##本", ""]
SUFFIXED = ["hel", "lo</w>", "</w>", "a</w>b", "wor", "ld</w>", ".</w>", "é"]


def trained(decoder, names, special=(END, "<s>")):
    vocabulary = {name: place for place, name in enumerate([*special, *names])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    inner.add_special_tokens(list(special))
    inner.decoder = decoder
    return TrainedTokenizer(inner)


def llama(*more):
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    return trained(decoders.Sequence(parts), LLAMA)


def added(tokenizer, names):
    """A tokenizer with added tokens, special and not, as chat models have."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.add_tokens(names)
    return TrainedTokenizer(inner)


KINDS = {
    "bytes": ByteTokenizer(),
    "byte-level": train_bpe(["the snake in the grass, the snake in the boat"] * 9, 280),
    "byte-level, Japanese": train_bpe([HIRAGANA] * 20, 300),
    "byte-level, added tokens": added(train_bpe([HIRAGANA] * 20, 300), ["<|user|>", "日本", "é\u0120"]),
    "byte-level and a strip": trained(decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 2, 0)]), ["a", "Ã"]),
    "Llama": llama(decoders.Strip(" ", 1, 0)),
    "Llama, three": llama(decoders.Strip(" ", 3, 0)),
    "Llama without a strip": llama(),
    "Llama, stripped at the end": llama(decoders.Strip(",", 0, 1)),
    "Metaspace": trained(decoders.Metaspace(), LLAMA),
    "Metaspace, never": trained(decoders.Metaspace(prepend_scheme="never"), LLAMA),
    "Metaspace, then bytes": trained(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), LLAMA),
    "WordPiece": trained(decoders.WordPiece(), PIECES),
    "WordPiece as it is": trained(decoders.WordPiece(cleanup=False), PIECES),
    "words with a suffix": trained(decoders.BPEDecoder(), SUFFIXED),
    "words with a suffix, then a strip": trained(
        decoders.Sequence([decoders.BPEDecoder(), decoders.Fuse(), decoders.Strip("h", 1, 0)]), SUFFIXED
    ),
    "expressions": trained(decoders.Sequence([decoders.Replace(Regex("l+"), "L"), decoders.Fuse()]), LLAMA),
    "CTC": trained(decoders.CTC(pad_token="lo"), LLAMA),
    "sequences in a sequence": trained(decoders.Sequence([decoders.Sequence([decoders.Fuse()])]), LLAMA),
    "no decoder": trained(None, PIECES),
}


def streamed(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.finish()


def outcome(function):
    try:
        return function()
    except ValueError:  # the library panics where a text to be stripped is empty
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text(kind):
    tokenizer = KINDS[kind]
    some = st.integers(-1, tokenizer.vocab_size + 1) | st.sampled_from([1 << 31, 1 << 33, tokenizer.end_of_text])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(some, max_size=24))
    def check(ids):
        assert outcome(lambda: streamed(tokenizer, ids)) == outcome(lambda: tokenizer.decode(ids))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_follows_another(kind):
    """Without the text before, but as it is behind that; or as it is by itself, where a decoder cannot tell."""
    tokenizer = KINDS[kind]
    some = st.integers(0, tokenizer.vocab_size - 1)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(some, max_size=8), st.lists(some, max_size=12))
    def check(before, ids):
        def following():
            decoder = StreamDecoder(tokenizer, before)
            return "".join(map(decoder.push, ids)) + decoder.finish()

        found, alone = outcome(following), outcome(lambda: tokenizer.decode(ids))
        first, both = outcome(lambda: tokenizer.decode(before)), outcome(lambda: tokenizer.decode(before + ids))
        if None in (found, alone, first, both):
            return
        assert found == alone or both.endswith(found)
        settled = both.startswith(first) and "\ufffd" not in both
        assert not settled or found in (alone, both[len(first) :])

    check()


def test_a_space_and_half_a_character_follow():
    tokenizer = KINDS["Llama"]
    world = tokenizer.vocab_size and LLAMA.index("▁world") + 2
    assert StreamDecoder(tokenizer).push(world) == "world"
    assert StreamDecoder(tokenizer, [LLAMA.index("▁hello") + 2]).push(world) == " world"
    assert StreamDecoder(ByteTokenizer(), "né".encode()[:-1]).push(0xA9) == "é"
    byte = {name: LLAMA.index(name) + 2 for name in ("<0x0A>", "<0xE2>", "<0x82>", "<0xAC>")}
    after = StreamDecoder(tokenizer, [byte["<0x0A>"]])
    assert after.push(world) == " world", "a whole character before is not said again"
    half = StreamDecoder(tokenizer, [byte["<0xE2>"], byte["<0x82>"]])
    assert half.push(byte["<0xAC>"]) + half.push(world) == "€ world"


@pytest.mark.parametrize("kind", KINDS)
def test_spellings_are_what_tokens_add(kind):
    """The bytes of tokens, one after the other, are those of the text, where a decoder looks at each by itself."""
    tokenizer = KINDS[kind]
    if kind not in ("bytes", "byte-level", "byte-level, Japanese", "Llama without a strip", "Metaspace, never"):
        assert all(isinstance(tokenizer.spelling(token), bytes) for token in range(-1, tokenizer.vocab_size + 1))
        return
    names = {token: name for name, token in tokenizer.special.items()}
    plain = [token for token in range(tokenizer.vocab_size) if token not in names]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(plain), max_size=12))
    def check(ids):
        raw = b"".join(map(tokenizer.spelling, ids)).decode(errors="replace")
        assert raw == tokenizer.decode(ids) or "\ufffd" in raw

    check()
    assert all(tokenizer.spelling(token) == name.encode() for token, name in names.items())


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=16))
def test_any_bytes(raw):
    assert streamed(ByteTokenizer(), raw) == raw.decode(errors="replace")
    letters = json.loads(ByteTokenizer().to_json())["model"]["vocab"]
    byte_level = trained(decoders.ByteLevel(), sorted(letters, key=letters.__getitem__))
    assert streamed(byte_level, [2 + byte for byte in raw]) == raw.decode(errors="replace")


def test_text_comes_as_early_as_it_can():
    """Of two characters that share a token the first is shown at once, and no piece holds half of one."""
    tokenizer = KINDS["byte-level, Japanese"]
    ids, decoder, shown = tokenizer.encode(HIRAGANA), StreamDecoder(KINDS["byte-level, Japanese"]), ""
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert shown == tokenizer.decode(ids[:count]).rstrip("\ufffd")
    early = StreamDecoder(KINDS["Llama"])
    assert [early.push(token) for token in (2, 1, 3, 4)] == ["hello", "", " world", " "]


def test_a_decoder_that_panics_says_so():
    tokenizer, comma = trained(decoders.Strip(",", 0, 3), LLAMA), LLAMA.index(",") + 2
    with pytest.raises(ValueError, match="cannot decode the ids"):
        tokenizer.decode([comma])
    with pytest.raises(ValueError, match="cannot decode the ids"):
        StreamDecoder(tokenizer).push(comma)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("ab", max_size=4), max_size=9), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_until_a_text_wherever_pieces_are_cut(pieces, stops):
    text, until = "".join(pieces), UntilText(stops)
    shown = "".join(map(until.push, pieces)) + until.finish()
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert shown == text[: min(ends)[1] if ends else None]
    assert until.found == bool(ends) and until.shown == len(shown)
