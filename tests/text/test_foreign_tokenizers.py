"""Tokenizers made elsewhere: their settings do not change the ids of a text, and no file ends in a traceback."""

import json
import os
import random
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from moemamba.text import ByteTokenizer, StreamDecoder, TrainedTokenizer, load_tokenizer, train_bpe

TEXT = "hello world, the cat sat </s> on\n\tthe mat: naïve 日本語 🐍 <|endoftext|>"


def library(model=None, **parts):
    """A tokenizer of the library, with `</s>` as its end."""
    inner = tokenizers.Tokenizer(model or models.BPE())
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.add_special_tokens(["</s>"])
    return inner


def words(*names, **parts):
    model = models.WordLevel({name: k for k, name in enumerate(("[UNK]", "</s>", *names))}, unk_token="[UNK]")
    return library(model, **{"pre_tokenizer": pre_tokenizers.Whitespace(), **parts})


def saved(inner, folder):
    (folder / "tokenizer.json").write_text(inner.to_str(), encoding="utf-8")
    return folder


def bpe():
    return tokenizers.Tokenizer.from_str(train_bpe([TEXT] * 9, 300).to_json())


def dropping(inner):
    inner.model.dropout = 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.enable_truncation(4),
        lambda inner: inner.enable_padding(length=64),
        lambda inner: inner.enable_padding(pad_to_multiple_of=8),
        dropping,
        lambda inner: setattr(
            inner,
            "post_processor",
            processors.TemplateProcessing(
                single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
            ),
        ),
    ],
)
def test_settings_do_not_change_the_ids_of_a_text(change, tmp_path):
    inner = bpe()
    expected = TrainedTokenizer(bpe()).encode_batch([TEXT * 9, "hi"])
    change(inner)
    loaded = load_tokenizer(saved(inner, tmp_path))
    for _ in range(2):
        found = loaded.encode_batch([TEXT * 9, "hi"])
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
        assert loaded.encode("hi") == expected[1].tolist()
    again = tokenizers.Tokenizer.from_str(loaded.to_json())
    assert again.truncation is None and again.padding is None


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>"])
@pytest.mark.parametrize("marked", ["not special", "only a word"])
def test_the_end_is_never_in_a_text(name, marked, tmp_path):
    model = models.WordLevel({"[UNK]": 0, name: 1, "a": 2}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if marked == "not special":
        inner.add_tokens([name])
    loaded = load_tokenizer(saved(inner, tmp_path))
    assert loaded.end_of_text == 1
    assert 1 not in loaded.encode(f"a {name} a") and 1 not in loaded.encode_batch([f"a {name} a"])[0]
    assert loaded.decode([2, 1, 2]).split() == ["a", "a"]
    decoder = StreamDecoder(loaded)
    assert "".join(map(decoder.push, [2, 1, 2])) + decoder.finish() == loaded.decode([2, 1, 2])


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.add_special_tokens(["<|user|>"]),
        lambda inner: inner.add_tokens(["cat"]),
        lambda inner: setattr(inner, "normalizer", normalizers.Lowercase()),
        lambda inner: setattr(inner, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)),
        lambda inner: setattr(inner, "decoder", decoders.Fuse()),
    ],
)
def test_only_the_byte_tokenizer_is_taken_for_it(change, tmp_path):
    inner = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    assert isinstance(load_tokenizer(saved(inner, tmp_path)), ByteTokenizer)
    change(inner)
    loaded = load_tokenizer(saved(inner, tmp_path))
    assert isinstance(loaded, TrainedTokenizer)
    assert loaded.vocab_size == max(inner.get_vocab().values()) + 1
    assert loaded.encode("The cat") == inner.encode("The cat").ids


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            lambda: words(normalizer=normalizers.Replace("a", "a" * 10**6)),
            r"normalizer can make a text 1,000,000 times",
        ),
        (
            lambda: words(normalizer=normalizers.Sequence([normalizers.Replace("a", "a" * 20)] * 6)),
            "normalizer can make a text 64,000,000 times",
        ),
        (lambda: words(normalizer=normalizers.Replace(Regex("."), "xy" * 99)), "normalizer can make a text"),
        (lambda: words(normalizer=normalizers.Prepend("a" * 10**5)), "normalizer can make a text"),
        (lambda: words(decoder=decoders.Replace("a", "a" * 10**6)), "decoder can make a text"),
        (
            lambda: words(
                post_processor=processors.TemplateProcessing(single="$A $A </s>", special_tokens=[("</s>", 1)])
            ),
            "post-processor repeats the text",
        ),
    ],
)
def test_what_no_memory_has_room_for_is_refused(inner, message, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer.json cannot be used as a tokenizer.*{message}"):
        load_tokenizer(saved(inner(), tmp_path))


@pytest.mark.parametrize("where", ["vocabulary", "added"])
def test_ids_that_no_embedding_has_room_for(where, tmp_path):
    values = json.loads(bpe().to_str())
    if where == "vocabulary":
        values["model"]["vocab"]["the"] = 10**9
        (tmp_path / "merges.txt").write_text("#version: 0.2")
        (tmp_path / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
        with pytest.raises(ValueError, match="has the id 1,000,000,000"):
            load_tokenizer(tmp_path)
    else:
        values["added_tokens"][0]["id"] = 10**9
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has the id 1,000,000,000"):
        load_tokenizer(tmp_path)


def test_replacements_that_published_files_have_are_not():
    several = [
        normalizers.Replace(*pair) for pair in (("©", "(c)"), ("…", "..."), ("½", "1/2"), (" ", "▁"), ("“", '"'))
    ]
    tokenizer = TrainedTokenizer(words(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), *several * 9])))
    assert tokenizer.encode("© …")


@pytest.mark.parametrize(
    "inner",
    [
        lambda: library(models.WordLevel({"a": 0}, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.Whitespace()),
        lambda: library(models.BPE({"a": 0}, []), pre_tokenizer=pre_tokenizers.Split(Regex("^(a+)+$"), "isolated")),
    ],
)
def test_a_text_that_the_library_cannot_encode(inner):
    tokenizer = TrainedTokenizer(inner())
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match="cannot encode the text"):
            encode("a" * 40 + "b c")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TrainedTokenizer(words("a"))])
def test_half_a_character(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match="cannot encode the text: it holds half a character"):
            encode("a\ud83d")


def test_files_are_looked_at_first(tmp_path):
    file = tmp_path / "tokenizer.json"
    os.mkfifo(file)
    for source in (file, tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            load_tokenizer(source)
    file.unlink()
    with file.open("wb") as stream:
        stream.truncate(201 << 20)
    with pytest.raises(ValueError, match="more than the"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size is 99999999999.*most"):
        train_bpe(["text"], 99999999999)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(bpe(), tmp_path)
    assert load_tokenizer("~/tokenizer.json").vocab_size == load_tokenizer("~").vocab_size


def lost(tokenizer, *texts):
    return tokenizer.lost(texts, [tokenizer.encode(text) for text in texts])


def test_what_a_tokenizer_cannot_spell():
    assert lost(ByteTokenizer(), TEXT) == lost(TrainedTokenizer(bpe()), TEXT, "", "ﬁ é e\u0301") == 0
    some = TrainedTokenizer(words("the", "cat"))
    assert lost(some, "the cat", "the  the\n") == 0
    assert lost(some, "the cat sat", "日本 the") == 3 + 6
    assert some.lost(["the cat sat"], [np.array(some.encode("the cat sat"), np.uint32)]) == 3
    without = TrainedTokenizer(library(models.BPE({"a": 0, "b": 1}, []), decoder=decoders.Fuse()))
    assert without.encode("abc") == [0, 1] and lost(without, "abc", "éa") == 1 + 2
    letters = json.loads(ByteTokenizer().to_json())["model"]["vocab"]
    ascii_only = models.BPE({letter: byte for letter, byte in letters.items() if byte < 128}, [])
    level = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    assert lost(TrainedTokenizer(library(ascii_only, **level)), "naïve text") == 2
    alike = library(
        models.BPE({"x": 0}, []), normalizer=normalizers.Replace(Regex("\\S"), "x"), decoder=decoders.Fuse()
    )
    assert lost(TrainedTokenizer(alike), "all the same") == 10
    unigram = library(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], 0))
    assert lost(TrainedTokenizer(unigram), "abc") == 1


# The fuzz test: what JSON can hold in the place of anything.
WILD = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e308,
    10**9,
    2**31,
    2**32,
    2**63,
    "",
    "a",
    "</s>",
    "a" * 3000,
    [],
    {},
    [[]],
    ["a", "b"],
]
PARTS = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 90},
    {"type": "Replace", "pattern": {"Regex": "^(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Strip", "content": " ", "start": 9, "stop": 9, "strip_left": True, "strip_right": True},
    {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "ByteFallback"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "Prepend", "prepend": "a" * 70},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
]


def places(value, found=()):
    """Paths of all values in a JSON value."""
    yield found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*found, key))


def mutant(values, choose):
    values = json.loads(json.dumps(values))
    for _ in range(choose.randint(1, 3)):
        *path, last = choose.choice([path for path in places(values) if path])
        holder = values
        for key in path:
            holder = holder[key]
        kind = choose.random()
        if kind < 0.2 and isinstance(holder, dict):
            del holder[last]
        elif kind < 0.4:
            holder[last] = dict(choose.choice(PARTS))
        elif kind < 0.5 and isinstance(holder[last], str):
            holder[last] = holder[last][::-1]
        elif kind < 0.6 and isinstance(holder[last], list):
            holder[last] = holder[last] * 2
        else:
            holder[last] = json.loads(json.dumps(choose.choice(WILD)))
    return values


def sources():
    small = tokenizers.Tokenizer.from_str(train_bpe(["ab ab"], 257).to_json())
    metaspace = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    piece = models.WordPiece({"[UNK]": 0, "</s>": 1, "a": 2, "##b": 3}, unk_token="[UNK]")
    unigram = models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁b", -1.0)], 0)
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    found = [
        library(piece, pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece()),
        library(unigram, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=metaspace, post_processor=template),
        words("a", "b", normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("a", "b")])),
        library(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), pre_tokenizer=pre_tokenizers.ByteLevel()),
    ]
    found[0].enable_truncation(4)
    found[1].enable_padding()
    return [json.loads(inner.to_str()) for inner in (*found, small)]


def test_changed_files_work_or_say_why_not(tmp_path):
    choose, kinds, outcomes = random.Random(0), sources(), {"works": 0, "refused": 0}
    file, until = tmp_path / "tokenizer.json", time.monotonic() + 20
    for _ in range(3000):
        if time.monotonic() > until:
            break
        file.write_text(json.dumps(mutant(choose.choice(kinds), choose)), encoding="utf-8")
        try:
            use(load_tokenizer(file))
            outcomes["works"] += 1
        except ValueError as error:
            assert len(str(error)) > 20 and "\n" not in str(error)[:60]
            outcomes["refused"] += 1
    assert min(outcomes.values()) > sum(outcomes.values()) / 30 > 10, outcomes


def use(tokenizer):
    text = "a aab" + "a" * 40 + " é </s>"
    ids = tokenizer.encode(text)
    assert [tokenizer.encode_batch([text])[0].tolist()] == [ids]
    assert tokenizer.end_of_text not in ids and max(ids, default=0) < tokenizer.vocab_size
    ids = [*ids, tokenizer.end_of_text, 1]
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)
    tokenizer.lost([text], [ids])
    TrainedTokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_json()))
