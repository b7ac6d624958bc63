"""Text to token files on disk, once: from then on they are opened from a cache."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import read_json
from ..host.files import cache_folder, expanded, keep_recent, new_directory, used, writable, write_json
from ..tokenizer import Tokenizer
from .data import Tokens
from .documents import Documents, held_out

FORMAT = 2  # of the files below; a change hides caches of older versions
KEPT = 64  # prepared sources in the cache; those used least recently are removed beyond
HELD_OUT = 0.05  # share of the documents that becomes validation data unless told otherwise
GROUP = (1 << 18) * (os.cpu_count() or 1)  # characters of text that are tokenised together
BLOCK = 1 << 20  # tokens of a .bin file read, and turned into text, at once


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens of one source."""

    name: str
    train: Tokens
    validation: Tokens
    """empty if nothing was held out"""
    content: str
    """hash of the training tokens"""
    skipped: int
    """files that were not UTF-8 text"""


Show = Callable[[int, int], None]
"""told the bytes of text read so far, and how many there are, 0 if that is not known"""


def prepare(
    source: str | None,
    tokenizer: Tokenizer,
    cache: Path,
    held_out: float = HELD_OUT,
    show: Show = lambda done, total: None,
) -> Corpus:
    """Tokenise a source once, and open it from the cache from then on.

    Args:
        source: what `Documents` reads, a .bin file of little-endian uint16 tokens in which the tokenizer's end-of-text
            token ends documents, or a folder that `write_tokens` has written, which is opened as it is.
        cache: folder of all prepared sources; each lies below it by a fingerprint of source and tokenizer.
        held_out: share of the documents that becomes validation data.
    Raises:
        FileNotFoundError, ValueError: see `Documents`; a source without text; tokens that the tokenizer does not have.
        OSError: the cache cannot be written.
    """
    if is_prepared(source):
        return _open(expanded(str(source)), tokenizer)
    documents = Documents(source)
    folder = cache / digest([FORMAT, held_out, tokenizer.to_json(), documents.fingerprint()])
    if not folder.exists():
        try:
            write_tokens(folder, documents, tokenizer, held_out, show)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        keep_recent(cache, r"[0-9a-f]{24}", KEPT)
    used(folder)
    return _open(folder, tokenizer)


def write_tokens(
    folder: Path, documents: Documents, tokenizer: Tokenizer, held_out: float, show: Show = lambda done, total: None
) -> Corpus:
    """Tokenise into a new folder, which appears when it is complete; memory does not grow with the text.

    Raises:
        FileExistsError: there is something at `folder` already.
        FileNotFoundError, ValueError, OSError: see `prepare`.
    """
    found = documents.fingerprint()
    with new_directory(folder) as beside:
        _write(beside, documents, tokenizer, held_out, show)
        (beside / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        if documents.fingerprint() != found:
            raise ValueError(f"{documents.name} changed while it was read; start again when it is complete")
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed, or slower
        shutil.rmtree(leftover, ignore_errors=True)
    return _open(folder, tokenizer)


def is_prepared(source: str | None) -> bool:
    """Whether a source is a folder that `write_tokens` has written."""
    return source is not None and all((expanded(source) / name).is_file() for name in ("index.json", "train.ends"))


def cache_directory(fallback: Path) -> Path:
    """Where prepared sources are kept: ~/.cache/moemamba (below XDG_CACHE_HOME if set), or `fallback` if unwritable."""
    cache = cache_folder()
    return cache if cache is not None and writable(cache) else fallback


class _Encoded(NamedTuple):
    """A document."""

    ids: NDArray[Any]
    text: bytes


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

    def index(self) -> dict[str, Any]:
        """What index.json says about the file."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "dtype": self.dtype.str,
            "content": self.hash.hexdigest(),
        }


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer, share: float, show: Show) -> None:
    done = shown = 0
    with _Writer(folder, "train", tokenizer) as train, _Writer(folder, "validation", tokenizer) as validation:
        for document in _encoded(documents, tokenizer):
            (validation if share and held_out(document.text, share) else train).add(document)
            done += len(document.text)
            if done - shown >= 1 << 20:
                shown = done
                show(done, documents.text_bytes)
    if not done:
        raise ValueError(f"there is no text in {documents.name}; give a file or folder with UTF-8 text")
    index = {
        "name": documents.name,
        "tokenizer": digest(tokenizer.to_json()),
        "skipped": len(documents.skipped),
        "train": train.index(),
        "validation": validation.index(),
    }
    write_json(folder / "index.json", index)


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus:
    index: dict[str, Any] = read_json(folder / "index.json")
    if index["tokenizer"] != digest(tokenizer.to_json()):
        raise ValueError(f"{folder} was prepared with another tokenizer; give that one, or prepare the text again")
    tokens = []
    for name in ("train", "validation"):
        part = index[name]
        ids, ends = _map(folder / f"{name}.bin", part["dtype"]), _map(folder / f"{name}.ends", "<i8")
        if (len(ids), len(ends)) != (part["tokens"], part["documents"]):
            raise ValueError(f"the prepared tokens in {folder} are incomplete; remove that folder and start again")
        tokens.append(Tokens(ids, ends, part["bytes"]))
    return Corpus(index["name"], tokens[0], tokens[1], index["train"]["content"], index["skipped"])


def _map(file: Path, dtype: str) -> NDArray[Any]:
    """A file as an array; an empty file cannot be mapped."""
    return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def _encoded(documents: Documents, tokenizer: Tokenizer) -> Iterator[_Encoded]:
    if documents.is_tokens:
        yield from _cut(documents.files[0], tokenizer)
        return
    for texts in _groups(documents):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            yield _Encoded(ids, text.encode())


def _cut(file: Path, tokenizer: Tokenizer) -> Iterator[_Encoded]:
    """The documents of a file of uint16 tokens."""
    if (size := file.stat().st_size) % 2:
        raise ValueError(f"{file} has {size:,} bytes, an odd number; a .bin file holds uint16 tokens, two bytes each")
    ids = _map(file, "<u2")
    start = 0
    for first in range(0, len(ids), BLOCK):
        block = ids[first : first + BLOCK]
        if (largest := int(block.max())) >= tokenizer.vocab_size:
            raise ValueError(
                f"{file} holds the token {largest}, but the tokenizer has {tokenizer.vocab_size}; "
                "name the tokenizer that wrote the file"
            )
        ends = (first + np.flatnonzero(block == tokenizer.end_of_text)).tolist()
        documents = []
        for end in (*ends, len(ids)) if first + BLOCK >= len(ids) else ends:
            if end > start:
                documents.append(ids[start:end])
            start = end + 1
        for document, text in zip(documents, tokenizer.decode_batch(documents), strict=True):
            yield _Encoded(document, text.encode())


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
