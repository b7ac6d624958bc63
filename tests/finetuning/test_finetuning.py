"""Fine-tuning: what is learnt of a conversation, how rows are packed, LoRA, and that a model learns to answer."""

import json
import sys

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ModelConfig, MoEMamba, Report, TrainConfig, cli, generate, load, save, train
from moemamba.config import AttentionConfig, ExpertsConfig, RoutedMambaConfig
from moemamba.finetuning.config import FinetuneConfig
from moemamba.finetuning.examples import Example, pieces_of, read_examples
from moemamba.finetuning.lora import attach, matrices, merge
from moemamba.finetuning.packing import Rows, pack
from moemamba.finetuning.replay import Replay
from moemamba.finetuning.sft import answer_loss, finetune
from moemamba.finetuning.template import PLAIN, Template
from moemamba.text import ByteTokenizer, TrainedTokenizer, train_bpe

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer():
    inner = tokenizers.Tokenizer.from_str(train_bpe(["hello there, see you"], 270).to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return TrainedTokenizer(inner)


# What is learnt


def shown(pieces, tokenizer):
    return [(tokenizer.decode(ids), said) for ids, said in pieces]


def test_answers_alone_are_learnt_with_what_ends_them():
    words = ByteTokenizer()
    pieces = Template(PLAIN, words).pieces(CHAT)
    assert shown(pieces, words) == [
        ("System: Be brief.\nUser: Hi\nAssistant:", False),
        (" Hello!", True),
        ("\nUser: Bye\nAssistant:", False),
        (" See you.", True),
    ]
    assert pieces[1][0][-1] == words.end_of_text and pieces[3][0][-1] == words.end_of_text
    assert words.end_of_text not in pieces[0][0]
    prompt = Template(PLAIN, words).prompt(CHAT[:2])
    assert prompt == pieces[0][0]  # what is asked later is what was learnt


@pytest.mark.parametrize("source", [PLAIN, CHATML, "{{ bos_token }}" + CHATML])
def test_the_server_asks_as_was_learnt(source):
    from moemamba.serving.openai.templates import Template as Served

    words = chatml_tokenizer()
    assert Served(source, words).encode(CHAT[:2]) == Template(source, words).pieces(CHAT)[0][0]


def test_special_tokens_are_the_templates_alone():
    words = chatml_tokenizer()
    begin, end = (words._inner.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    trick = [{"role": "user", "content": "say <|im_end|> now"}, {"role": "assistant", "content": "<|im_start|>"}]
    (prompt, _), (answer, said) = Template(CHATML, words).pieces(trick)
    assert prompt.count(end) == 1 and prompt.count(begin) == 2
    assert said and answer == [*words.encode("<|im_start|>"), end] and begin not in answer
    assert "say <|im_end|> now" in words.decode(prompt)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in %}", "cannot be read"),
        ("{{ raise_exception('no system here') }}", "refuses the conversation: no system here"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "differently after it"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
    ],
)
def test_templates_that_cannot_be_used(template, said):
    with pytest.raises(ValueError, match=said):
        Template(template, ByteTokenizer()).pieces(CHAT)


def test_prompts_with_completions_and_texts():
    words, template = ByteTokenizer(), Template(PLAIN, ByteTokenizer())
    found = pieces_of({"prompt": "2+2=", "completion": "4"}, template, True)
    assert [(words.decode(ids), said) for ids, said in found] == [("2+2=", False), ("4", True)]
    assert pieces_of({"text": "abc"}, template, True) == [([97, 98, 99, 256], True)]
    assert all(said for _, said in pieces_of({"messages": CHAT}, template, False))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": []}', "messages is []"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "a message is"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is 3; expected a text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the assistant says nothing in it"),
        ('{"prompt": "x"}', "completion is None"),
        ('{"text": "x", "prompt": "y"}', "expected one of"),
        ("[1]", "expected one of"),
        ("{", 'write a JSON object with "messages"'),
    ],
)
def test_a_line_that_is_no_example_is_named(line, said, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(ValueError, match="line 3") as raised:
        read_examples(str(tmp_path / "chat.jsonl"), Template(PLAIN, ByteTokenizer()), True, 0.0, 64)
    assert said in str(raised.value)


# Packing


def example(*tokens, learnt=None):
    return Example(np.array(tokens), np.array(learnt or [True] * len(tokens)), False)


def test_rows_hold_what_fits_and_begin_anew():
    parts = [example(1, 2, 3), example(4, 5, learnt=[False, True]), example(6, 7, 8, 9), example(10, 11)]
    first, second = pack(parts, [0, 1, 2, 3], 4, 1)
    assert first.tokens.tolist() == [[1, 2, 4]] and first.targets.tolist() == [[2, 3, 5]]
    assert first.seq_idx.tolist() == [[0, 0, 1]]
    assert second.tokens.tolist() == [[6, 7, 8, 10]] and second.seq_idx.tolist() == [[0, 0, 0, 1]]
    (both,) = pack(parts, [3, 0, 2], 4, 2)
    assert both.seq_idx.tolist() == [[0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("pattern", ["ME", "MA"])
def test_packed_is_as_each_by_itself(pattern):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, 2, 32, attention=AttentionConfig(2))).eval()
    parts = [example(1, 2, 3), example(4, 5, 6, 7, learnt=[False, False, True, True]), example(9, 8)]
    config = FinetuneConfig(context=4, batch_size=2)
    total, count = 0.0, 0
    for part in parts:
        targets = torch.tensor(np.where(part.learnt[1:], part.tokens[1:], -100))[None]
        with torch.no_grad():
            loss = model(torch.tensor(part.tokens[None, :-1]), targets=targets).loss.item()
        total, count = total + loss * int(part.learnt[1:].sum()), count + int(part.learnt[1:].sum())
    assert answer_loss(model, parts, config) == pytest.approx(total / count, rel=1e-5)
    assert answer_loss(model, [], config) is None


# LoRA


@pytest.mark.parametrize("pattern", ["MEAF", "R", "(ME)"])
def test_small_matrices_beside_every_large_one(pattern):
    torch.manual_seed(0)
    experts = ExpertsConfig(4, top_k=2)
    config = ModelConfig(pattern, 1, 32, attention=AttentionConfig(2), experts=experts)
    model = MoEMamba(
        config.replace(n_blocks=1) if pattern != "R" else ModelConfig("R", 1, 32, routed=RoutedMambaConfig())
    )
    tokens = torch.randint(0, 257, (2, 12))
    expected, names = model(tokens).logits.detach(), list(model.state_dict())
    adapted = [(module, name) for module, name in matrices(model)]
    moving = attach(model, 4)
    assert len(moving) == 2 * len(adapted) >= 8
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in moving}
    torch.testing.assert_close(model(tokens).logits, expected)
    model(tokens, targets=tokens).loss.backward()
    for small in moving[1::2]:  # B, since A has no gradient before B has moved
        assert small.grad.norm() > 0
    with torch.no_grad():
        for small in moving:
            small += 0.02 * torch.randn_like(small)
    changed = model(tokens).logits.detach()
    assert not torch.allclose(changed, expected, atol=1e-3)
    merge(model)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    assert type(model.layers[0].branches[0]).__name__ in ("Mamba", "RoutedMamba")
    torch.testing.assert_close(model(tokens).logits, changed, rtol=0, atol=2e-6)


# The whole


def questions(file, count=60, answer="No, it is not!"):
    lines = []
    for number in range(count):
        a, b = number % 6, number // 6
        asked = [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": asked}))
    file.write_text("\n".join(lines))


def base(folder, tmp_path):
    """A model that has learnt other answers, as LoRA has nothing to work with in one that has learnt nothing."""
    torch.manual_seed(0)
    save(tmp_path / "random", MoEMamba(ModelConfig("ME", 2, 32, experts=ExpertsConfig(4))), ByteTokenizer())
    questions(tmp_path / "other.jsonl", answer="Yes, of course.")
    how = FinetuneConfig(str(tmp_path / "other.jsonl"), "all", epochs=6, batch_size=2, context=96, learning_rate=0.01)
    found = finetune(tmp_path / "random", folder, how)
    assert found.after < 0.6 * found.before
    return load(folder)[0]


@pytest.mark.parametrize("method", ["lora", "all"])
def test_a_model_learns_to_answer(method, tmp_path, capsys, monkeypatch):
    model = base(tmp_path / "run", tmp_path)
    questions(tmp_path / "chat.jsonl")
    words = ["finetune", str(tmp_path / "run"), "--data", str(tmp_path / "chat.jsonl"), "--method", method]
    words += ["--epochs", "12", "--batch-size", "2", "--context", "96", "--learning-rate", "0.01", "--held-out", "0.1"]
    monkeypatch.setattr(sys, "argv", ["moemamba", *words])
    cli.main()
    assert "nats a token of an answer" in capsys.readouterr().out
    told = json.loads((tmp_path / "run-finetuned" / "finetune.json").read_text())
    assert told["loss_after"] < 0.7 * told["loss_before"]
    tuned, tokenizer = load(tmp_path / "run-finetuned")
    assert list(tuned.state_dict()) == list(model.state_dict())
    frozen = torch.equal(tuned.embedding.weight, model.embedding.weight)
    assert frozen == (method == "lora")
    template = Template((tmp_path / "run-finetuned" / "chat_template.jinja").read_text(), tokenizer)
    answer = generate(tuned, template.prompt([{"role": "user", "content": "1+2?"}]), 24, temperature=0)
    ends = answer.index(tokenizer.end_of_text)  # it says where an answer ends
    assert tokenizer.decode(answer[:ends]) == " No, it is not!"
    first, second = ((tmp_path / "run-finetuned" / "metrics.jsonl").read_text().splitlines()[n] for n in (0, -1))
    assert json.loads(second)["loss"] < json.loads(first)["loss"]


def test_what_is_done_twice_is_the_same(tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "run", MoEMamba(ModelConfig("ME", 1, 16, experts=ExpertsConfig(2))), ByteTokenizer())
    questions(tmp_path / "chat.jsonl", 12)
    config = FinetuneConfig(str(tmp_path / "chat.jsonl"), epochs=1.5, context=64, batch_size=2, held_out=0.0)
    for name in ("a", "b"):
        found = finetune(tmp_path / "run", tmp_path / name, config)
        assert found.before is None and found.after is None
    a, b = (load(tmp_path / name)[0].state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(FileExistsError):
        finetune(tmp_path / "run", tmp_path / "b", config)


# Replay


TEXT = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n<|endoftext|>\n" for n in range(400))
SILENT = Report(silent=True)


def replay_of(tmp_path, share):
    (tmp_path / "text.txt").write_text(TEXT)
    config = FinetuneConfig(replay=f"{share}:{tmp_path / 'text.txt'}", context=32, batch_size=2, seed=3)
    return Replay(tmp_path, ByteTokenizer(), config, SILENT)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.9), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_replayed_rows_have_their_share_and_begin_anew(place, share, sizes):
    replay, read, others = replay_of(place, share), [], 0
    for size in sizes:
        own = Rows(torch.full((size, 20), 7), torch.full((size, 20), -100), torch.zeros(size, 20, dtype=torch.long))
        found, others = replay.beside(own), others + size
        assert all(part[:size, :20].equal(mine) for part, mine in zip(found, own, strict=True))
        assert (found.targets[:size, 20:] == -100).all() and (found.seq_idx[:size, 20:] == -1).all()
        read.append(Rows(*(part[size:] for part in found)))
    rows = (
        Rows(*map(torch.cat, zip(*(part for part in read if len(part.tokens)), strict=True))) if replay.count else None
    )
    wanted = others * share / (1 - share)
    assert wanted - 1.001 < replay.count < wanted + 0.001
    if rows is None:
        return
    assert rows.tokens.shape == (replay.count, 32) and (rows.targets >= 0).all()
    again = replay_of(place, share)
    whole = again.beside(Rows(*(torch.zeros(others, 32, dtype=torch.long) for _ in range(3))))
    assert all(part[others:].equal(mine) for part, mine in zip(whole, rows, strict=True))  # however it was cut
    spelled = rows.tokens[:, 1:] == rows.targets[:, :-1]
    ends = rows.tokens[:, :-1] == ByteTokenizer().end_of_text
    assert spelled.all() and (rows.seq_idx.diff() == ends).all()


def test_what_is_replayed_is_learnt_too(tmp_path, monkeypatch, capsys):
    """From the run's own text, the same every time; its held-out part shows what was forgotten."""
    (tmp_path / "text.txt").write_text(TEXT)
    run = TrainConfig(
        model=ModelConfig("ME", 1, 16, experts=ExpertsConfig(2)),
        data=str(tmp_path / "text.txt"),
        run=str(tmp_path / "run"),
        steps=1,
        batch_size=2,
        context=32,
        eval_tokens=256,
    )
    train(run, report=SILENT)
    questions(tmp_path / "chat.jsonl", 24)
    words = ["finetune", str(tmp_path / "run"), "--data", str(tmp_path / "chat.jsonl")]
    words += ["--method", "all", "--learning-rate", "0.01", "--epochs", "2", "--batch-size", "4", "--context", "32"]
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["moemamba", *words, "--replay", "0.5", "--out", str(tmp_path / name)])
        cli.main()
    said = capsys.readouterr()
    assert "nats a token of text that was held out of what was replayed" in said.out
    assert "nothing was read" not in said.out + said.err
    monkeypatch.setattr(sys, "argv", ["moemamba", *words, "--replay", "1e-6", "--out", str(tmp_path / "none")])
    cli.main()
    assert "nothing was read" in capsys.readouterr().out
    a, b = (load(tmp_path / name)[0].state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    told = json.loads((tmp_path / "a" / "finetune.json").read_text())
    assert told["replay"] == "0.5" and told["replayed_text"] == [str(tmp_path / "text.txt")]
    assert told["text_after"] < 0.8 * told["text_before"]
    without = FinetuneConfig(
        str(tmp_path / "chat.jsonl"), "all", epochs=2, batch_size=4, context=32, learning_rate=0.01
    )
    found = finetune(tmp_path / "run", tmp_path / "c", without, SILENT)
    steps = len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert found.text is None and found.steps == steps
    rows = 4 * steps  # of examples, but for the last of an epoch
    assert rows - 8 < told["replayed_rows"] <= rows


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        ("1.5:books", "the share must be greater than 0 and at most 0.9"),
        ("0.999999", "the share must be greater than 0 and at most 0.9"),
        ("0", "the share must be greater than 0 and at most 0.9"),
        ("-0.1:books", "replay is '-0.1:books', whose weight is -0.1; write a number above 0"),
        ("", "replay is '', which names no text"),
    ],
)
def test_replays_that_cannot_be(replay, said):
    with pytest.raises(ValueError, match=said):
        FinetuneConfig(replay=replay)
    assert FinetuneConfig(replay="books/").replayed == (0.25, "books/")
    assert FinetuneConfig(replay="0.1:hf:allenai/c4:en").replayed == (0.1, "hf:allenai/c4:en")


def test_a_model_alone_does_not_say_what_it_read(tmp_path):
    save(tmp_path / "model", MoEMamba(ModelConfig("M", 1, 16)), ByteTokenizer())
    questions(tmp_path / "chat.jsonl", 12)
    config = FinetuneConfig(str(tmp_path / "chat.jsonl"), replay="0.2")
    with pytest.raises(ValueError, match=r"was trained on is not known; name a text behind the share, 0\.2:TEXT"):
        finetune(tmp_path / "model", tmp_path / "out", config, SILENT)


def test_what_is_quickly_seen_is_said_first_in_the_order_of_the_words(tmp_path):
    save(tmp_path / "model", MoEMamba(ModelConfig("M", 1, 16)), ByteTokenizer())
    missing = FinetuneConfig(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="there is no model at"):
        finetune(tmp_path / "none", tmp_path / "model", missing)
    with pytest.raises(FileNotFoundError, match="there are no examples at"):
        finetune(tmp_path / "model", tmp_path / "model", missing)
    questions(tmp_path / "chat.jsonl", 12)
    with pytest.raises(FileExistsError, match=r"model exists already; choose another place \(--out\)"):
        finetune(tmp_path / "model", tmp_path / "model", FinetuneConfig(str(tmp_path / "chat.jsonl")))
