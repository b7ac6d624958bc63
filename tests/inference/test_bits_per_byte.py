"""Bits per byte count the bytes of what was predicted, and are left out where tokens do not spell the text."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from moemamba import ModelConfig, MoEMamba, TrainConfig, evaluate, train
from moemamba.cli import eval as eval_command
from moemamba.data.batches import Tokens
from moemamba.data.preparation import prepare
from moemamba.data.windows import predicted_bytes, windows
from moemamba.host.progress import Report
from moemamba.text import ByteTokenizer, load_tokenizer, train_bpe
from moemamba.training.config import absolute

SILENT = Report(silent=True)


def mixed(lines=4000):
    """Text whose bytes for a token differ from place to place."""
    rng = random.Random(0)
    easy = " ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran", "home"], k=lines))
    hard = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(lines))
    return easy, hard


def prepared(tmp_path, tokenizer, text):
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    return prepare(str(tmp_path / "t.txt"), tokenizer, tmp_path / "cache", 0).train


@pytest.mark.parametrize("context", [7, 64, 300])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_are_those_of_the_tokens_read(tmp_path, kind, context):
    easy, hard = mixed()
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe([easy], 300)
    tokens = prepared(tmp_path, tokenizer, f"{easy}\n{hard}")
    starts, tail = windows(tokens, context, len(tokens.ids) // 5)
    assert tail == 0 and 1 <= len(starts) < len(tokens.ids) // context
    of_byte = [1 if i < 256 else 0 for i in range(257)]
    if kind == "bpe":  # byte-level: a token's letters are its bytes
        letters = json.loads(tokenizer.to_json())["model"]["vocab"]
        special = tokenizer.end_of_text
        of_byte = [0] * tokenizer.vocab_size
        for letter, i in letters.items():
            of_byte[i] = 0 if i == special else len(letter)
    exact = sum(of_byte[i] for start in starts for i in tokens.ids[start + 1 : start + 1 + context])
    found = predicted_bytes(tokens, context, len(tokens.ids) // 5)
    assert found == pytest.approx(exact, rel=0 if kind == "bytes" else 0.01)
    if context == 300:
        share = tokens.bytes * len(starts) * context / len(tokens.ids)
        assert abs(found - exact) <= abs(share - exact) + 1e-9
    whole = predicted_bytes(tokens, context)
    assert whole == pytest.approx(tokens.bytes - of_byte[int(tokens.ids[0])])


def test_a_uniform_model_has_the_bits_that_its_tokens_have(tmp_path):
    """Of a model that predicts nothing, a part's bits per byte are log2(vocabulary) x tokens / bytes of that part."""
    easy, hard = mixed(1500)
    tokenizer = train_bpe([easy], 300)
    tokens = prepared(tmp_path, tokenizer, f"{easy}\n{hard}")
    model = MoEMamba(ModelConfig("M", 1, 8, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        model.embedding.weight.zero_()
    for most in (None, 500):
        found = evaluate(model, tokens, context=50, most=most)
        bits = math.log2(tokenizer.vocab_size) * found.tokens / predicted_bytes(tokens, 50, most)
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert evaluate(model, tokens, context=50).tokens == len(tokens.ids) - 1


def test_tokens_that_the_model_does_not_have():
    model = MoEMamba(ModelConfig("M", 1, 8, vocab_size=50))
    tokens = Tokens(np.arange(60).astype(np.uint16), np.array([60]), 59)
    with pytest.raises(ValueError, match="holds the token 50, but the model has 50"):
        evaluate(model, tokens, context=50)


def lossy(tmp_path):
    """A tokenizer that knows a single word."""
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["[UNK]", "[SEP]"])
    words.save(str(tmp_path / "t.json"))
    return tmp_path / "t.json"


def test_what_tokens_lose_is_measured_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text(f"{mixed()[0]}")
    corpus = prepare(str(tmp_path / "x.txt"), load_tokenizer(lossy(tmp_path)), tmp_path / "cache")
    assert 0.6 < corpus.lost < 0.95
    again = prepare(str(tmp_path / "x.txt"), load_tokenizer(lossy(tmp_path)), tmp_path / "cache")
    assert again.lost == corpus.lost == again.validation.lost
    config = TrainConfig(
        ModelConfig("M", 1, 8), data=tmp_path / "x.txt", tokenizer=tmp_path / "t.json", run=tmp_path / "r",
        steps=1, batch_size=2, context=16, eval_tokens=400,
    )  # fmt: skip
    result = train(config)
    assert math.isnan(result.evaluation.bits_per_byte) and result.evaluation.loss > 0
    said = capsys.readouterr().out
    assert "the tokens do not spell" in said and "bits per byte mean nothing" in said
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line for line in lines if line["kind"] == "evaluation"]
    assert "bits_per_byte" not in evaluation and evaluation["loss"] > 0
    eval_command.main([str(tmp_path / "r")])
    assert "none: the tokens do not spell" in capsys.readouterr().out


def test_nothing_is_lost_by_bytes_and_byte_level_tokens(tmp_path):
    text = "".join(mixed(300))
    for tokenizer in (ByteTokenizer(), train_bpe([text], 400)):
        tokens = prepared(tmp_path, tokenizer, text)
        assert tokens.lost == 0 and tokens.spelled == 1


def test_paths_of_data(tmp_path, monkeypatch):
    """Empty names are refused, Path is as good as str, ~ is the home folder, and a run can be evaluated anywhere."""
    for name in ("data", "validation"):
        for value in ("", "  "):
            with pytest.raises(ValueError, match=rf"{name} is .*which names no text"):
                TrainConfig(**{name: value})
    with pytest.raises(ValueError, match="which names no text"):
        TrainConfig(data=("a.txt", ""))
    assert TrainConfig(data=tmp_path, run=tmp_path / "r") == TrainConfig(data=str(tmp_path), run=f"{tmp_path}/r")
    assert TrainConfig(data=(tmp_path, tmp_path)).data == (str(tmp_path),) * 2
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    asked = TrainConfig(data=("0.5:~/a.txt", "2:b", "1:hf:c/d"), validation="v.txt", run="~/r")
    settled = absolute(asked)
    assert settled.data == (f"0.5:{tmp_path}/a.txt", f"2:{tmp_path}/b", "1:hf:c/d")
    assert (settled.validation, settled.run) == (f"{tmp_path}/v.txt", f"{tmp_path}/r")
    assert absolute(settled) == settled and absolute(TrainConfig()).data is None


def test_a_run_is_evaluated_and_resumed_from_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(mixed()[0])
    config = TrainConfig(ModelConfig("M", 1, 8), "t.txt", run="~/r", steps=2, batch_size=2, context=16, eval_tokens=100)
    train(config, stop=1, report=SILENT)
    assert (tmp_path / "r" / "train.json").exists() and not (tmp_path / "~").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    eval_command.main(["../r"])
    assert "bits per byte" in capsys.readouterr().out
    begun = TrainConfig(**{**vars(config), "data": json.loads((tmp_path / "r" / "train.json").read_text())["data"]})
    assert train(begun, resume=True, report=SILENT).step == 2
    (tmp_path / "t.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"the run in \.\./r was trained on it: name a text with --data"):
        eval_command.main(["../r"])
    with pytest.raises(ValueError, match="--data is '', which names nothing"):
        eval_command.main(["../r", "--data", ""])


def test_evaluations_without_a_figure_are_plain_json():
    from moemamba.training.evaluate import Evaluation

    found = Evaluation(1.0, math.e)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["loss"] == 1.0
    assert "bits_per_byte" not in found.to_dict() and dataclasses.replace(found, bits_per_byte=2.0).to_dict()
