"""Text to token ids and back: bytes, or any tokenizer.json of the `tokenizers` library."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from .foreign import check_growth, check_ids, obey_nothing, refusal
from .pieces import Held, Pieces, Trained, Utf8, byte_vocabulary, pieces_of, speller

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
        """Ids of a text, without `end_of_text`. Names of special tokens in it count as plain text.

        Raises:
            ValueError: the tokenizer cannot encode this text.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """As `encode` for many texts, as arrays, in parallel where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and ids that there are not vanish, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: the tokenizer cannot decode these ids.
        """

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        """As `decode` for many, in parallel where that helps."""

    def pieces(self) -> Pieces:
        """`decode` for ids that come one by one."""

    def spelling(self, token: int) -> bytes:
        """What a token stands for within a text, perhaps half a character; of a special one its name."""

    @property
    def special(self) -> Mapping[str, int]:
        """Tokens that no text spells, such as the end of one, by name."""

    def lost(self, texts: Sequence[str], ids: Sequence[Sequence[int] | NDArray[np.integer[Any]]]) -> int:
        """Bytes of texts that their ids, as `encode` makes them, do not spell.

        Counted are characters, white space aside, that are not there when the ids are decoded: what became an unknown
        token, what was left out, and what another character stands for. Forms of one character (NFKC) are the same.
        """

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""


class ByteTokenizer:
    """Every byte of UTF-8 is a token: no training, any text, 256 values and the end-of-text mark."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        return [np.frombuffer(_utf8(text), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        return [self.decode(ids.tolist()) for ids in documents]

    def pieces(self) -> Pieces:
        return Utf8()

    def spelling(self, token: int) -> bytes:
        return END_OF_TEXT.encode() if token == self.end_of_text else bytes(range(token, min(token + 1, 256)))

    @property
    def special(self) -> Mapping[str, int]:
        return {END_OF_TEXT: self.end_of_text}

    def lost(self, texts: Sequence[str], ids: Sequence[Sequence[int] | NDArray[np.integer[Any]]]) -> int:
        return 0

    def to_json(self) -> str:
        """A byte-level BPE without merges, so that other programs read it too."""
        plain = tokenizers.Tokenizer(models.BPE(byte_vocabulary(), []))
        byte_level(plain, use_regex=False)
        plain.add_special_tokens([END_OF_TEXT])
        return plain.to_str(pretty=True)


class NoTokenizer:
    """Stands where a model has no tokenizer, since what it reads is no text: it only knows how many tokens there are.

    Raises:
        ValueError: whenever it is asked for more.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as copying and pickling ask for
            raise AttributeError(name)
        raise ValueError("the model was saved without a tokenizer: give it token ids, and read its ids")


class TrainedTokenizer:
    """A tokenizer of the `tokenizers` library.

    What its file asks of encoding beyond the ids of a text (truncation, padding, dropout) is switched off.

    Raises:
        ValueError: it has no token that ends a document, ids that no embedding has room for, or rules that would make
            a text very much longer.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        obey_nothing(inner)
        check_growth(inner)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        names = [name for name in _END_NAMES if name in vocabulary]
        if not names:
            raise ValueError(f"the tokenizer has no token that ends a document; add one of {', '.join(_END_NAMES)}")
        check_ids(vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[names[0]]
        inner.add_special_tokens([tokenizers.AddedToken(names[0], special=True, normalized=False)])
        self._special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
        self._unknown = _unknown(inner)

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise refusal(error, "encode the text") from error
        return [i for i in ids if i != self.end_of_text] if self.end_of_text in ids else ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        try:
            encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            raise refusal(error, "encode the text") from error
        arrays = (np.array(one.ids, np.uint32) for one in encoded)
        return [ids[ids != self.end_of_text] for ids in arrays]

    def decode(self, ids: Iterable[int]) -> str:
        try:
            known = [i for i in ids if 0 <= i < self.vocab_size]
            return self._inner.decode(known, skip_special_tokens=True)
        except BaseException as error:
            raise refusal(error, "decode the ids") from error

    def decode_batch(self, documents: Sequence[NDArray[np.integer[Any]]]) -> list[str]:
        try:
            return self._inner.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)
        except BaseException as error:
            raise refusal(error, "decode the ids") from error

    def pieces(self) -> Pieces:
        steps = pieces_of(self._inner.decoder)
        return Held(self.decode) if steps is None else Trained(self._inner, self._special, steps)

    def spelling(self, token: int) -> bytes:
        name = self._inner.id_to_token(token) if 0 <= token < self.vocab_size else None
        if name is None:
            return b""
        return name.encode() if name in self._special else self._spell(name)

    @cached_property
    def _spell(self) -> Callable[[str], bytes]:
        return speller(self._inner.decoder)

    @property
    def special(self) -> Mapping[str, int]:
        return {name: number for name in self._special if (number := self._inner.token_to_id(name)) is not None}

    def lost(self, texts: Sequence[str], ids: Sequence[Sequence[int] | NDArray[np.integer[Any]]]) -> int:
        arrays = (np.asarray(one, np.int64) for one in ids)
        spelled = self.decode_batch([one[one != self._unknown] for one in arrays])
        return sum(map(_missing, texts, spelled))

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise refusal(error, "encode the text") from error


def _unknown(inner: tokenizers.Tokenizer) -> int:
    """The id that stands for what a tokenizer does not know, or -1."""
    if isinstance(inner.model, models.Unigram):
        found = json.loads(inner.model.__getstate__())["unk_id"]
        return -1 if found is None else int(found)
    name = getattr(inner.model, "unk_token", None)
    found = None if name is None else inner.token_to_id(name)
    return -1 if found is None else int(found)


def _missing(text: str, spelled: str) -> int:
    """Bytes of the characters of a text that another does not hold, or not as often."""
    if text == spelled:
        return 0
    there, back = (Counter(unicodedata.normalize("NFKC", each)) for each in (text, spelled))
    return sum(count * len(letter.encode()) for letter, count in (there - back).items() if not letter.isspace())


def byte_level(inner: tokenizers.Tokenizer, use_regex: bool = True) -> None:
    """Give a tokenizer GPT-2's way with bytes."""
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
