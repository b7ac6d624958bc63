"""Documents that Python hands over, texts or arrays of ids, made into a folder of tokens for runs to come."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..host.files import expanded
from ..text import Tokenizer, load_tokenizer, numbers
from .documents import Documents
from .preparation import HELD_OUT, write_tokens
from .prepared import Corpus

REMEMBERED = 4096  # documents that can be read once only, and must be read twice where one side got none of so few

LONGEST = 4096  # characters of a path

Document = Any
"""a text, or what numpy makes a one-dimensional array of integers of: an array, a tensor, a list"""


def prepare(
    documents: str | Path | Iterable[Document],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | None = None,
    vocab_size: int | None = None,
    end: int | None = None,
    held_out: float = HELD_OUT,
) -> Corpus:
    """Write a folder of tokens, which `TrainConfig(data=out)` and `evaluate` then take, as `moemamba prepare` does.

    Args:
        documents: a path, as `TrainConfig.data` takes it; or an iterable, be it a generator or a torch Dataset, of
            texts, or of one-dimensional arrays of ids, each of which is a document (a sequence, an image, a song).
            Memory does not grow with it.
        out: the folder, which must not exist yet; it appears when it is complete.
        tokenizer: of texts; bytes if None. A name or a path is read by `load_tokenizer`.
        vocab_size: of arrays: their ids are 0 to vocab_size - 1.
        end: the one of those ids that ends a document, which is added behind each; one more, vocab_size, if None, so
            that a model has vocab_size + 1 tokens.
        held_out: share of the documents that is kept for evaluation, chosen by the hash of their content.
    Returns:
        the tokens of both sides, `train` and `validation`, memory-mapped.
    Raises:
        FileExistsError: there is something at `out` already.
        ValueError: a document that is neither a text nor ids, an id that there is not, or no document at all.
        OSError: the folder cannot be written.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be 0 or more and less than 1")
    folder = expanded(out)
    if folder.exists():
        raise FileExistsError(f"{out} exists already; choose another folder, or remove it")
    if isinstance(documents, str) and (len(documents) > LONGEST or "\n" in documents):
        raise ValueError("documents is a text, where a path is expected; give [text], or a list of several")
    if isinstance(documents, str | Path):
        return write_tokens(folder, Documents(documents), _of_texts(tokenizer, vocab_size), held_out)
    handed = Handed(documents)
    if not handed.of_ids:
        return write_tokens(folder, handed, _of_texts(tokenizer, vocab_size), held_out)
    if vocab_size is None:
        raise ValueError("the documents are arrays of ids; say how many ids there are with vocab_size")
    if tokenizer is not None:
        raise ValueError("the documents are arrays of ids, which no tokenizer makes; leave tokenizer out")
    handed.vocab_size = vocab_size
    return write_tokens(folder, handed, numbers(vocab_size, end), held_out)


def _of_texts(tokenizer: Tokenizer | str | None, vocab_size: int | None) -> Tokenizer:
    found = load_tokenizer(tokenizer or "bytes") if tokenizer is None or isinstance(tokenizer, str) else tokenizer
    if vocab_size not in (None, found.vocab_size):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the tokenizer has {found.vocab_size}; leave it out for texts"
        )
    return found


class _Indexed:
    """The documents of a torch Dataset, which has a length and numbers; Python alone would count on without end."""

    def __init__(self, documents: Any):
        if not (hasattr(documents, "__len__") and hasattr(documents, "__getitem__")):
            raise ValueError(
                f"documents is a {type(documents).__name__}; expected an iterable of texts or arrays of ids"
            )
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        return (self._documents[number] for number in range(len(self._documents)))


class Handed:
    """What `write_tokens` reads in place of `Documents`.

    Attributes:
        of_ids: arrays and not texts, as the first of them is.
        vocab_size: of arrays.
    """

    name, text_bytes, is_tokens = "documents from Python", 0, False
    skipped: dict[Path, str]

    def __init__(self, documents: Iterable[Document]):
        self.skipped, self.vocab_size = {}, 0
        self._read: list[Document] = []
        if not isinstance(documents, Iterable):
            documents = _Indexed(documents)
        self._rest = iter(documents)
        self._once = self._rest is documents
        self._whole = documents
        try:
            first = next(self._rest)
        except StopIteration:
            raise ValueError("there are no documents; give one or more") from None
        self.of_ids = not isinstance(first, str)
        if self._once:
            self._rest = chain([first], self._rest)

    def fingerprint(self) -> list[Any]:
        return []

    def notes(self) -> tuple[str, ...]:
        return ()

    def __iter__(self) -> Iterator[str]:
        """Texts."""
        for number, document in enumerate(self._documents()):
            if not isinstance(document, str):
                raise ValueError(
                    f"document {number} is a {type(document).__name__}, and others are texts; give one kind"
                )
            if document:
                yield document

    def ids(self) -> Iterator[NDArray[Any]]:
        """Arrays of ids."""
        return (self._checked(number, document) for number, document in enumerate(self._documents()))

    def _documents(self) -> Iterator[Document]:
        if not self._once:
            yield from self._whole
            return
        if len(self._read) > REMEMBERED:
            raise ValueError("all documents are alike, or too few differ to hold some out; give held_out=0, or a list")
        yield from self._read
        for document in self._rest:
            if len(self._read) <= REMEMBERED:
                self._read.append(document)
            yield document

    def _checked(self, number: int, document: Document) -> NDArray[Any]:
        where, ids = f"document {number}", np.asarray(document)
        if isinstance(document, str) or ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            what = f"{ids.dtype} of shape {ids.shape}"
            if ids.dtype.kind not in "iufb":
                what = "a text" if isinstance(document, str) else f"a {type(document).__name__}"
            raise ValueError(f"{where} is {what}; expected a one-dimensional array of integers, one or more")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            odd = low if low < 0 else high
            raise ValueError(
                f"{where} has the id {odd}; with vocab_size = {self.vocab_size} ids are 0 to {self.vocab_size - 1}"
            )
        return ids
