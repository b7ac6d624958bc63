"""Text to token ids and back: bytes, or any tokenizer.json of the `tokenizers` library. No torch here."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from .host.files import expanded

END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call the token that ends a document, most specific name first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_text(self) -> int:
        """The id that follows every document; a prompt from nothing begins with it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `end_of_text`. Names of special tokens in it count as plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """As `encode` for many texts, as arrays, in parallel where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens vanish, bytes that are not UTF-8 become U+FFFD."""

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        """As `decode` for many, in parallel where that helps."""

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""


class ByteTokenizer:
    """Every byte of UTF-8 is a token: no training, any text, 256 values and the end-of-text mark."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        return [self.decode(ids.tolist()) for ids in documents]

    def to_json(self) -> str:
        """A byte-level BPE without merges, so that other programs read it too."""
        plain = tokenizers.Tokenizer(models.BPE(_byte_vocabulary(), []))
        _byte_level(plain, use_regex=False)
        plain.add_special_tokens([END_OF_TEXT])
        return plain.to_str(pretty=True)


class TrainedTokenizer:
    """A tokenizer of the `tokenizers` library.

    Raises:
        ValueError: it has no token that ends a document.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        self._inner.encode_special_tokens = True  # text that spells a special token must not become one
        vocabulary = inner.get_vocab(with_added_tokens=True)
        names = [name for name in _END_NAMES if name in vocabulary]
        if not names:
            raise ValueError(f"the tokenizer has no token that ends a document; add one of {', '.join(_END_NAMES)}")
        self.end_of_text = vocabulary[names[0]]
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        return self._inner.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)


class StreamDecoder:
    """Text of tokens that arrive one by one, never half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the tokens shown last: some decoders treat the first of a text in its own way
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._pending.append(token)
        text = self._text()
        # An unfinished character decodes to U+FFFD; with four tokens waiting it cannot be one, since it has four bytes.
        return "" if text.endswith("\ufffd") and len(self._pending) < 4 else self._show(text)

    def finish(self) -> str:
        """What is left at the end."""
        return self._show(self._text())

    def _text(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._pending)[len(known) :]

    def _show(self, text: str) -> str:
        self._before, self._pending = self._pending, []
        return text


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name or from disk.

    Args:
        source: "bytes", a tokenizer.json, or a directory that has one (or GPT-2's vocab.json and merges.txt).
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a tokenizer, or has no token that ends a document.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = expanded(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if not file.is_file() and (path / "merges.txt").is_file():
            inner = tokenizers.Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
            _byte_level(inner)
            inner.add_special_tokens([END_OF_TEXT])
            return TrainedTokenizer(inner)
        text = file.read_text(encoding="utf-8")
        if json.loads(text)["model"]["vocab"] == _byte_vocabulary():
            return ByteTokenizer()
        return TrainedTokenizer(tokenizers.Tokenizer.from_str(text))
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no tokenizer at {file}; give "bytes", or a tokenizer.json') from None
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be used as a tokenizer: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (as GPT-2's) trained on texts.

    Raises:
        ValueError: the vocabulary has no room for all bytes and the end-of-text mark.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least 257")
    inner = tokenizers.Tokenizer(models.BPE())
    _byte_level(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return TrainedTokenizer(inner)


def _byte_level(inner: tokenizers.Tokenizer, use_regex: bool = True) -> None:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()


def _byte_vocabulary() -> dict[str, int]:
    """Every byte by the printable letter that byte-level tokenizers spell it with."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(others)): byte for byte in range(256)}
