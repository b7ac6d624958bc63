"""Text to token files on disk, once: from then on they are opened from a cache."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..host.files import (
    cache_folder,
    expanded,
    keep_recent,
    new_directory,
    reading,
    replace,
    used,
    writable,
    write_json,
)
from ..reading import to_dict
from ..text import Tokenizer
from .documents import Documents, hash_of
from .prepared import Corpus, Index, Part, digest, is_prepared, open_prepared
from .tokenfiles import documents_of

FORMAT = 3  # of the files below, and of what is read as text; a change hides caches of older versions
KEPT = 64  # prepared sources in the cache; those used least recently are removed beyond
HELD_OUT = 0.05  # share of the documents that becomes validation data unless told otherwise
GROUP = (1 << 18) * (os.cpu_count() or 1)  # characters of text that are tokenised together
MEASURED = 16  # the share of the text on which it is measured what tokens lose is one of so many
FEW = 20  # documents, of which the hash cannot be expected to hold out the share asked for

Show = Callable[[int, int], None]
"""told the bytes of text read so far, and how many there are, 0 if that is not known"""


class Source(Protocol):
    """Documents to be tokenised: `Documents`, or what Python hands over (`handed`)."""

    name: str
    text_bytes: int
    of_ids: bool
    """its documents are ids already"""
    skipped: dict[Path, str]

    def fingerprint(self) -> list[Any]: ...
    def notes(self) -> tuple[str, ...]: ...
    def __iter__(self) -> Iterator[str]: ...
    def ids(self) -> Iterator[NDArray[Any]]: ...


def prepare(
    source: str | Path | None,
    tokenizer: Tokenizer,
    cache: Path,
    held_out: float = HELD_OUT,
    show: Show = lambda done, total: None,
) -> Corpus:
    """Tokenise a source once, and open it from the cache from then on.

    Args:
        source: what `Documents` reads; files of tokens, in which the tokenizer's end-of-text token ends documents
            (`tokenfiles`); or a folder that `write_tokens` has written, which is opened as it is.
        cache: folder of all prepared sources; each lies below it by a fingerprint of source and tokenizer.
        held_out: share of the documents that becomes validation data.
    Raises:
        FileNotFoundError, ValueError: see `Documents`; a source without text; tokens that the tokenizer does not have.
        OSError: the cache cannot be written.
    """
    if source is not None and is_prepared(source):
        return open_prepared(expanded(source), tokenizer, cache)
    documents = Documents(source)
    folder = cache / digest([FORMAT, held_out, tokenizer.to_json(), documents.fingerprint()])
    if not folder.exists():
        try:
            return write_tokens(folder, documents, tokenizer, held_out, show)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        keep_recent(cache, r"[0-9a-f]{24}", KEPT)
    used(folder)
    return open_prepared(folder, tokenizer, cache)


def write_tokens(
    folder: Path, documents: Source, tokenizer: Tokenizer, held_out: float, show: Show = lambda done, total: None
) -> Corpus:
    """Tokenise into a new folder, which appears when it is complete; memory does not grow with the text.

    Documents are held out by a hash of their content, so that copies go together. Where that leaves one side without
    any, the document with the smallest hash is held out, and no other.

    Raises:
        FileExistsError: there is something at `folder` already.
        FileNotFoundError, ValueError, OSError: see `prepare`.
    """
    found = documents.fingerprint()
    with new_directory(folder) as beside:
        _write(beside, documents, tokenizer, held_out, show)
        replace(beside / "tokenizer.json", tokenizer.to_json())
        with reading(documents.name):
            again = documents.fingerprint()
        if again != found:
            raise ValueError(f"{documents.name} changed while it was read; start again when it is complete")
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed, or slower
        shutil.rmtree(leftover, ignore_errors=True)
    return open_prepared(folder, tokenizer)


def cache_directory(fallback: Path) -> Path:
    """Where prepared sources are kept: the package's cache folder, or `fallback` if that cannot be written."""
    cache = cache_folder()
    return cache if cache is not None and writable(cache) else fallback


class _Encoded(NamedTuple):
    """A document."""

    ids: NDArray[Any]
    text: bytes
    """that is hashed and counted"""


class _Writer:
    """Writes one `Tokens`."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.mark = np.array([tokenizer.end_of_text], self.dtype)
        self.ids, self.ends = ((folder / f"{name}{suffix}").open("wb") for suffix in (".bin", ".ends"))
        self.tokens = self.bytes = self.documents = 0
        self.hash = hashlib.blake2b(digest_size=12)

    def add(self, document: _Encoded) -> None:
        raw = document.ids.astype(self.dtype).tobytes() + self.mark.tobytes()
        self.tokens += len(document.ids) + 1
        self.bytes += len(document.text)
        self.documents += 1
        self.hash.update(raw)
        self.ids.write(raw)
        self.ends.write(self.tokens.to_bytes(8, "little"))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        with self.ids, self.ends:  # both are closed, even if closing one fails
            pass

    def part(self, spelled: float) -> Part:
        """What index.json says about the file."""
        dtype: Any = self.dtype.str
        return Part(self.tokens, self.documents, self.bytes, dtype, self.hash.hexdigest(), spelled)


@dataclass
class _Measured:
    """What a tokenizer makes of text, on a part of it."""

    tokenizer: Tokenizer
    bytes: int = 0
    lost: int = 0
    spelled: int = 0

    def look(self, texts: list[str], ids: list[NDArray[Any]]) -> None:
        left, count = sum(map(len, texts)) // MEASURED, 0
        while left >= 0 and count < len(texts):
            left -= len(texts[count])
            count += 1
        texts, ids = texts[:count], ids[:count]
        self.bytes += sum(len(text.encode()) for text in texts)
        self.lost += self.tokenizer.lost(texts, ids)
        self.spelled += sum(len(text.encode()) for text in self.tokenizer.decode_batch(ids))

    def share(self) -> float:
        """Of the bytes that are lost."""
        return self.lost / max(1, self.bytes)

    def ratio(self) -> float:
        """Bytes that tokens spell, for each byte of the text."""
        return self.spelled / self.bytes if self.spelled else 1.0


def _write(folder: Path, documents: Source, tokenizer: Tokenizer, share: float, show: Show) -> None:
    bound: float = share * 2**64
    low, high, index = _write_split(folder, documents, tokenizer, bound, show)
    if share and not (index.train.tokens and index.validation.tokens):
        bound = low + 1 if low < high else 0
        _, _, index = _write_split(folder, documents, tokenizer, bound, lambda done, total: None)
    write_json(folder / "index.json", to_dict(index) | {"notes": [*documents.notes(), *_warnings(index, share)]})


def _write_split(
    folder: Path, documents: Source, tokenizer: Tokenizer, bound: float, show: Show
) -> tuple[int, int, Index]:
    """Write both sides: documents whose hash is below `bound` are held out. The smallest and the largest hash."""
    low, high = 1 << 64, -1
    done = shown = 0
    measured = _Measured(tokenizer)
    with _Writer(folder, "train", tokenizer) as train, _Writer(folder, "validation", tokenizer) as validation:
        for document in _read(documents, tokenizer, measured):
            number = hash_of(document.text)
            low, high = min(low, number), max(high, number)
            (validation if number < bound else train).add(document)
            done += len(document.text)
            if done - shown >= 1 << 20:
                shown = done
                show(done, documents.text_bytes)
    if not done:
        left_out = "; ".join(documents.notes())
        raise ValueError(f"there is no text in {documents.name}; give text{f' ({left_out})' if left_out else ''}")
    ratio, name = measured.ratio(), digest(tokenizer.to_json())
    sides = train.part(ratio), validation.part(ratio)
    return low, high, Index(documents.name, name, len(documents.skipped), *sides, measured.share())


def _warnings(index: Index, share: float) -> list[str]:
    """What is odd about the shares of training and held-out text."""
    if not share:
        return []
    documents, held = index.train.documents + index.validation.documents, index.validation.documents
    if not held:
        return [
            "nothing is held out, since all documents are alike, or there is but one; name held-out text (validation)"
        ]
    if documents > FEW and not share / 4 < held / documents < 4 * share:
        return [
            f"{held:,} of {documents:,} documents are held out, since many are alike; better name held-out text "
            "(validation)"
        ]
    return []


def _read(documents: Source, tokenizer: Tokenizer, measured: _Measured) -> Iterator[_Encoded]:
    """What fails in here has not to do with the files that are being written."""
    with reading(documents.name):
        yield from _encoded(documents, tokenizer, measured)


def _encoded(documents: Source, tokenizer: Tokenizer, measured: _Measured) -> Iterator[_Encoded]:
    if documents.of_ids:
        for ids in documents.ids():
            yield _Encoded(ids, ids.astype("<u4").tobytes())
        measured.bytes = measured.lost = 1  # no text
        return
    if isinstance(documents, Documents) and documents.is_tokens:
        for ids, text in documents_of(documents, tokenizer):
            yield _Encoded(ids, text.encode())
        return
    for texts in _groups(documents):
        encoded = tokenizer.encode_batch(texts)
        measured.look(texts, encoded)
        for text, ids in zip(texts, encoded, strict=True):
            yield _Encoded(ids, text.encode())


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about GROUP characters, to be tokenised together."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
