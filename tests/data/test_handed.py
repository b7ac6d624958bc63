"""Documents from Python: texts and arrays of ids as folders of tokens, trained on and evaluated; or refused."""

import dataclasses

import numpy as np
import pytest
import torch

import moemamba as mm
from moemamba import ByteTokenizer, ModelConfig, MoEMamba, TrainConfig, evaluate, load, prepare, train
from moemamba.host.progress import Report
from moemamba.text import numbers

SILENT = Report(silent=True)


def sequences(count=60, length=40, ids=6):
    draws = np.random.default_rng(0)
    return [draws.integers(0, ids, length) for _ in range(count)]


def test_arrays_are_trained_on_and_evaluated(tmp_path):
    corpus = prepare(sequences(), tmp_path / "dna", vocab_size=6)
    assert len(corpus.train.ends) + len(corpus.validation.ends) == 60 and corpus.validation.ids.size
    first = sequences()[0]
    held = [corpus.train, corpus.validation]
    found = [np.array(t.ids[:41]) for t in held if np.array_equal(t.ids[:40], first)]
    assert len(found) == 1 and found[0][40] == 6  # the mark
    often = {"log_every": 2, "eval_every": 4, "eval_tokens": 64, "save_every": 4}
    config = TrainConfig(
        ModelConfig("ME", 1, 8),
        str(tmp_path / "dna"),
        run=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        context=16,
        **often,
    )
    result = train(config, report=SILENT)
    model, tokenizer = load(tmp_path / "run")
    assert model.config.vocab_size == 7 and tokenizer.encode("5 0 3") == [5, 0, 3] and tokenizer.decode([5, 0]) == "5 0"
    assert result.evaluation.bits_per_byte != result.evaluation.bits_per_byte  # there are no bytes
    ways = (corpus, corpus.validation, tmp_path / "dna", str(tmp_path / "dna"))
    losses = {evaluate(model, data, context=16).loss for data in ways}
    assert len(losses) == 1 and losses.pop() < 2.5
    with pytest.raises(ValueError, match="the model knows 5 tokens, but the tokenizer has 7"):
        small = MoEMamba(config.model.replace(vocab_size=5))
        train(dataclasses.replace(config, run=f"{config.run}-small"), model=small, report=SILENT)


@pytest.mark.parametrize("kind", [list, iter, lambda found: (torch.tensor(each) for each in found), "dataset"])
def test_any_iterable_will_do(kind, tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            if index >= 60:
                raise IndexError
            return torch.from_numpy(sequences()[index])

    documents = Data() if kind == "dataset" else kind(sequences())
    corpus = prepare(documents, tmp_path / "out", vocab_size=6, end=5)
    again = prepare(sequences(), tmp_path / "again", vocab_size=6, end=5)
    assert corpus.content == again.content and corpus.train.ids.max() == 5


def test_few_documents_have_two_sides(tmp_path):
    for number, documents in enumerate((sequences(2), iter(sequences(2)), iter(["one", "two"]))):
        corpus = prepare(documents, tmp_path / f"{number}", vocab_size=6 if number < 2 else None)
        assert len(corpus.train.ends) == len(corpus.validation.ends) == 1
    assert prepare(["one", "two"], tmp_path / "all", held_out=0).train.ids.tolist() == [*b"one", 256, *b"two", 256]


def test_texts_and_files(tmp_path):
    texts = [f"text {number}, which is short" for number in range(50)]
    corpus = prepare(texts, tmp_path / "texts")
    (tmp_path / "file.txt").write_text("\n<|endoftext|>\n".join(texts))
    assert prepare(tmp_path / "file.txt", tmp_path / "file").train.ids.size
    model = MoEMamba(ModelConfig("M", 1, 8))
    plain = evaluate(model, tmp_path / "file.txt", ByteTokenizer(), context=16)
    assert plain.tokens > corpus.validation.ids.size and plain.bits_per_byte > 0
    with pytest.raises(ValueError, match="give the model's tokenizer too"):
        evaluate(model, tmp_path / "file.txt")
    with pytest.raises(ValueError, match="data is none that can be evaluated"):
        evaluate(model, [torch.zeros(3)])


@pytest.mark.parametrize(
    ("documents", "more", "said"),
    [
        ([], {}, "there are no documents"),
        ([np.array([0, 6])], {"vocab_size": 6}, "document 0 has the id 6; with vocab_size = 6 ids are 0 to 5"),
        ([np.array([0]), np.array([-1])], {"vocab_size": 6}, "document 1 has the id -1"),
        ([np.zeros(3)], {"vocab_size": 6}, "document 0 is float64 of shape"),
        ([np.zeros((2, 2), int)], {"vocab_size": 6}, r"int64 of shape \(2, 2\); expected a one-dimensional"),
        ([np.array([1])], {}, "say how many ids there are with vocab_size"),
        ([np.array([1]), "text"], {"vocab_size": 6}, "document 1 is a text"),
        (["text", np.array([1])], {}, "document 1 is a ndarray, and others are texts"),
        (["text"], {"vocab_size": 6}, "vocab_size is 6, but the tokenizer has 257"),
        ([np.array([1])], {"vocab_size": 6, "end": 6}, "end is 6; it must be one of the ids"),
        ([np.array([1])], {"vocab_size": 6, "tokenizer": "bytes"}, "leave tokenizer out"),
        (["text"], {"held_out": 1.0}, "held_out is 1.0"),
    ],
)
def test_what_cannot_be_prepared(documents, more, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepare(documents, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


def test_numbers():
    tokenizer = numbers(4, end=0)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, 0)
    assert tokenizer.decode(tokenizer.encode("3 1 2")) == "3 1 2"
    with pytest.raises(ValueError):
        tokenizer.encode("7")
    assert mm.Tokens is type(mm.Tokens.__new__(mm.Tokens))


class Squares(torch.utils.data.Dataset):
    """As people write them: a length and numbers, and no end."""

    def __len__(self):
        return 40

    def __getitem__(self, number):
        assert number < 40, "nobody stops at the length"
        return torch.arange(number + 4) ** 2 % 12


def test_a_dataset_ends_at_its_length(tmp_path):
    found = prepare(Squares(), tmp_path / "numbers", vocab_size=12)
    listed = prepare([Squares()[number] for number in range(40)], tmp_path / "list", vocab_size=12)
    assert len(found.train.ends) + len(found.validation.ends) == 40
    assert np.array_equal(found.train.ids, listed.train.ids)


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (5, "documents is a int; expected an iterable"),
        ([{"input_ids": [1, 2]}], "document 0 is a dict; expected a one-dimensional array of integers"),
        ("a text\nof two lines", r"documents is a text, where a path is expected; give \[text\]"),
        ("word " * 2000, r"documents is a text, where a path is expected"),
    ],
)
def test_what_are_no_documents_is_named(documents, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepare(documents, tmp_path / "out", vocab_size=12)
