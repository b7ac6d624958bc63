"""GGUF files in llama.cpp (the package xllamacpp): the same tokens from the same text, and the same tokens after it."""

import gettext
import json
import os
import random
import re
import sysconfig
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import tokenizers
import torch

from moemamba import ModelConfig, MoEMamba, generate, save
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig
from moemamba.integrations.export import export
from moemamba.integrations.export.gguf_vocabulary import vocabulary
from moemamba.integrations.export.llama_cpp import compare, complete, tokenize
from moemamba.text import ByteTokenizer, TrainedTokenizer, load_tokenizer, train_bpe

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp): nothing was compared")

ASCII = [chr(byte) for byte in range(33, 127)]


def ascii_tokenizer():
    """Of ASCII alone, since llama.cpp does not tell probabilities of tokens that are parts of a character."""
    names = ["Ġ", "Ċ", *ASCII]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({name: number for number, name in enumerate(names)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return TrainedTokenizer(inner)


def build(pattern, inner, **more):
    torch.manual_seed(0)
    own = {"experts": ExpertsConfig(4, top_k=2, d_expert=96), "mamba": MambaConfig(inner_norm=inner)}
    model = MoEMamba(ModelConfig(pattern, 2, 64, **{"vocab_size": 100} | own | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


MODELS = {
    "M": ("M", "none", {}),
    "M weightless, tied": ("M", "weightless", {"tie_embeddings": True}),
    "ME": ("ME", "rmsnorm", {}),
    "ME plain": ("ME", "none", {"tie_embeddings": True}),
    "MEAF": (
        "MEAF",
        "rmsnorm",
        {"attention": AttentionConfig(4, n_kv_heads=2, rotary=False), "feedforward": FeedForwardConfig(96)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_and_probabilities(name, tmp_path):
    pattern, inner, more = MODELS[name]
    model, tokenizer = build(pattern, inner, **more), ascii_tokenizer()
    save(tmp_path / "run", model, tokenizer)
    export(tmp_path / "run", "gguf", tmp_path / "out")
    prompts, worst = [random.Random(seed).choices(range(96), k=12 + 9 * seed) for seed in range(2)], 0.0
    for prompt, found in zip(prompts, complete(tmp_path / "out" / "model.gguf", prompts, 24), strict=True):
        sequence = list(prompt)
        for step in found:
            with torch.no_grad():
                expected = model(torch.tensor([sequence])).logits[0, -1].log_softmax(-1)
            worst = max(worst, *(abs(each["logprob"] - expected[each["id"]].item()) for each in step["top_logprobs"]))
            sequence.append(step["id"])
        assert sequence[len(prompt) :] == generate(model, prompt, 24, temperature=0)
    assert worst <= 1e-5


def test_a_model_that_begins_with_a_part_of_a_character(tmp_path):
    """llama.cpp gives no probabilities then, and none are needed to open the file."""
    model, tokenizer = build("M", "none", vocab_size=257), ByteTokenizer()
    with torch.no_grad():
        hidden, _, _ = model.backbone(torch.tensor([[0]]))
        model.head.weight.zero_()[0xC3] = hidden[0, -1]
    assert generate(model, [0], 1, temperature=0) == [0xC3]
    save(tmp_path / "run", model, tokenizer)
    export(tmp_path / "run", "gguf", tmp_path / "out")
    assert compare(tmp_path / "out" / "model.gguf", tokenizer)


# Text


def translations(language: str) -> str:
    """What programs on this machine say in a language, if they have learnt it."""
    said = []
    for file in sorted(Path("/usr/share/locale").glob(f"{language}/LC_MESSAGES/*.mo")):
        with suppress(UnicodeDecodeError), file.open("rb") as stream:  # some say nothing of their encoding
            said += [text for text in gettext.GNUTranslations(stream)._catalog.values() if isinstance(text, str)]
    return "\n".join(said)


def letters(*ranges: tuple[int, int]) -> str:
    """Words of letters of a script, at random."""
    draw = random.Random(0)
    known = [chr(code) for first, last in ranges for code in range(first, last + 1)]
    words = ("".join(draw.choices(known, k=draw.randrange(1, 12))) for _ in range(3000))
    return "".join(word + draw.choice([" ", ", ", ".\n", "-", " 12 ", "'s ", "  "]) for word in words)


def samples() -> dict[str, str]:
    draw = random.Random(1)
    code = "".join(file.read_text() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")))
    languages = {
        "German": (translations("de"), letters((97, 122), (228, 228), (246, 246), (252, 252), (223, 223))),
        "Russian": (translations("ru"), letters((0x430, 0x44F))),
        "Chinese": (translations("zh_CN"), letters((0x4E00, 0x5E00))),
        "Japanese": (translations("ja"), letters((0x3042, 0x3093), (0x30A2, 0x30F3))),
        "Arabic": (translations("ar"), letters((0x627, 0x64A))),
    }
    emoji = [chr(code) for code in range(0x1F300, 0x1F6D0)] + ["👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", " ", "\n", "a"]
    blanks = (
        draw.choice([" ", "\t", "\n", "\r\n", " "]) * draw.randrange(1, 40) + draw.choice("ab1.") for _ in range(3000)
    )
    names = ["<|endoftext|>", "<s>", "</s>", "<|im_end|>", "[SEP]", "<|padding|>", "[unused3]", "Ġ", "Ċ"]
    return {
        **{name: found[: 1 << 20] + made for name, (found, made) in languages.items()},
        "code": code[: 1 << 20],
        "emoji": "".join(draw.choices(emoji, k=5000)),
        "blanks": "".join(blanks),
        "names": "".join(draw.choice(names) + draw.choice(["", " ", "x", "\n"]) for _ in range(2000)),
    }


CORPORA = os.environ.get("MOEMAMBA_CORPORA", "")


def known_tokenizers() -> dict[str, object]:
    found = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe([samples()["code"][:200_000]], 1000)}
    for name in ("gpt2", "gpt-neox-20b"):
        if (place := Path(CORPORA, "tokenizers", name)).is_dir() and CORPORA:
            found[name] = lambda place=place: load_tokenizer(place)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2", "gpt-neox-20b"])
def test_text_becomes_the_same_tokens(name, tmp_path):
    if name not in known_tokenizers():
        pytest.skip(f"no tokenizer {name}: set MOEMAMBA_CORPORA to a folder with tokenizers/{name}")
    tokenizer = known_tokenizers()[name]()
    torch.manual_seed(0)
    save(tmp_path / "run", MoEMamba(ModelConfig("M", 1, 8, vocab_size=tokenizer.vocab_size + 3)), tokenizer)
    export(tmp_path / "run", "gguf", tmp_path / "out")
    assert compare(tmp_path / "out" / "model.gguf", tokenizer)
    for kind, text in samples().items():
        if name == "gpt-neox-20b":  # it composes characters first, which llama.cpp does not: text as it is written
            text = unicodedata.normalize("NFC", text)
        parts = [text[begin : begin + 100_000] for begin in range(0, len(text), 100_000)]
        same = tokenize(tmp_path / "out" / "model.gguf", parts) == [tokenizer.encode(part) for part in parts]
        assert same, kind  # no comparison by assert, which would show a megabyte


# What llama.cpp would split otherwise


def changed(**changes):
    values = json.loads(train_bpe(["once upon a time"], 262).to_json())
    values["model"] |= changes.pop("model", {})
    return TrainedTokenizer(tokenizers.Tokenizer.from_str(json.dumps(values | changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it splits words by a rule of its own"),
        ({"pre_tokenizer": None}, "it splits words by a rule of its own"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "it splits words by a rule of its own",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "it does not split words",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "it changes the text before"),
        ({"model": {"ignore_merges": True}}, "it is no byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        vocabulary(changed(**changes), 262)


def test_what_is_written_is_compared(tmp_path):
    """The last look is llama.cpp's own: a file of another tokenizer is told by its first token."""
    tokenizer = train_bpe(["once upon a time, once upon a time"], 262)
    save(tmp_path / "run", MoEMamba(ModelConfig("M", 1, 8, vocab_size=262)), tokenizer)
    export(tmp_path / "run", "gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"llama\.cpp splits text otherwise .* from 'The"):
        compare(tmp_path / "out" / "model.gguf", train_bpe(["The The The quick quick"], 262))
