"""Tokenizers by name, from disk, and trained on a text."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ..host.files import check_regular, expanded, parse_json, read_json, read_text
from ..host.stop import interruptible
from .foreign import LARGEST_VOCABULARY, check_ids, refusal
from .tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, TrainedTokenizer, byte_level

FILE_LIMIT = 200 << 20
"""bytes of a tokenizer.json; the largest published ones have about 30 MB"""


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name or from disk.

    Args:
        source: "bytes", a tokenizer.json, or a directory that has one (or GPT-2's vocab.json and merges.txt).
    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        ValueError: the file is not a tokenizer, or one that `TrainedTokenizer` refuses.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = expanded(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if not file.exists() and (path / "merges.txt").exists():
            file = path / "vocab.json"
            make = partial(_gpt2, path)
        else:
            make = partial(_from_text, read_text(file, FILE_LIMIT))
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no tokenizer at {file}; give "bytes", or a tokenizer.json') from None
    try:
        return make()
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(refusal(error, "be read"), ValueError):
            raise
        raise ValueError(f"{file} cannot be used as a tokenizer: {error}") from error


def _gpt2(folder: Path) -> Tokenizer:
    """A byte-level BPE from the two files that GPT-2 came with."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    check_ids(read_json(vocabulary, FILE_LIMIT))
    check_regular(merges, FILE_LIMIT)
    inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    byte_level(inner)
    inner.add_special_tokens([END_OF_TEXT])
    return TrainedTokenizer(inner)


def _from_text(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; the byte tokenizer where the file is all that it wrote and nothing else."""
    values = parse_json(text, "it")
    if isinstance(values, dict):  # the library says of anything else what it is not
        model, added = values.get("model"), values.get("added_tokens")
        check_ids(model.get("vocab") if isinstance(model, dict) else None, added if isinstance(added, list) else None)
    inner, plain = tokenizers.Tokenizer.from_str(text), ByteTokenizer()
    if inner.get_vocab_size() == plain.vocab_size and json.loads(inner.to_str()) == json.loads(plain.to_json()):
        return plain
    return TrainedTokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (as GPT-2's) trained on texts.

    Raises:
        ValueError: the vocabulary has no room for all bytes and the end-of-text mark, or is larger than any can be.
    """
    if not 257 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level BPE needs at least 257, and {LARGEST_VOCABULARY:,} is the most"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    byte_level(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    interruptible(lambda handed: inner.train_from_iterator(handed, trainer), texts)
    return TrainedTokenizer(inner)


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer_config.json tells transformers: how to read tokenizer.json, and which token ends a text.

    That one fills rows up as well, since there need be no other; a mask tells where.
    """
    added = json.loads(tokenizer.to_json())["added_tokens"]
    end = next(token["content"] for token in added if token["id"] == tokenizer.end_of_text)
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    return named | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
