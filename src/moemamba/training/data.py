"""Text to token files on disk, and token files to batches that are a pure function of the step."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import new_directory, read_json, write_json
from ..tokenizer import Tokenizer
from .documents import Documents, held_out

FORMAT = 1  # of the files below; a change hides caches of older versions
HELD_OUT = 0.05  # share of the documents that becomes validation data where none is given
GROUP = 1 << 22  # characters of text that are tokenised together
BLOCK = 1 << 24  # tokens of a .bin file read at once


@dataclass(frozen=True)
class Tokens:
    """A text as token ids on disk, every document followed by the end-of-text token."""

    ids: NDArray[Any]
    """(n,) uint16 or uint32, memory-mapped"""
    ends: NDArray[np.int64]
    """(documents,) where each document ends, its end-of-text token included, memory-mapped"""
    bytes: int
    """of UTF-8 text"""


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens."""

    name: str
    train: Tokens
    validation: Tokens
    content: str
    """hash of the training tokens"""
    skipped: int
    """files that were not UTF-8 text"""


class Batch(NamedTuple):
    """Rows of text and what follows each token."""

    tokens: Tensor
    """(b, l) int64"""
    targets: Tensor
    """(b, l) int64, the tokens that follow"""
    seq_idx: Tensor | None
    """(b, l) int32 document of each token, counted from the row's first; None if state is not reset"""

    def to(self, device: torch.device) -> "Batch":
        """On another device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def split(self, parts: int) -> list["Batch"]:
        """Equal parts by rows."""
        rows = len(self.tokens) // parts
        return [self._each(lambda part, k=k: part[k * rows : (k + 1) * rows]) for k in range(parts)]  # type: ignore[misc]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(change(self.tokens), change(self.targets), None if self.seq_idx is None else change(self.seq_idx))


class Batches:
    """`batches[step]`: the same for ever, whatever the model does, wherever training stops and resumes.

    The tokens are cut into windows of `context` that do not overlap. Every epoch goes through all of them in its own
    order, a Feistel permutation of (seed, epoch), which needs neither memory nor state. The global batch of a step is
    shared out over ranks, so that several processes read together what one would.

    Args:
        batch_size: sequences of this rank in a step.
        reset_state: number the documents in `Batch.seq_idx`, so that every one begins from an empty state.
    Raises:
        ValueError: the tokens do not fill one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        context: int,
        seed: int,
        *,
        reset_state: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.tokens, self.batch_size, self.context, self.seed = tokens, batch_size, context, seed
        self.reset_state, self.rank, self.world_size = reset_state, rank, world_size
        require_window("the training data", tokens, context)
        self.windows = (len(tokens.ids) - 1) // context

    def chosen(self, step: int) -> NDArray[np.int64]:
        """(b,) the windows that this rank reads at a step."""
        first = (step * self.world_size + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size, dtype=np.uint64), np.uint64(self.windows))
        keys = _mix(np.full_like(epochs, self.seed), epochs)
        return permute(places, self.windows, keys).astype(np.int64)

    def __getitem__(self, step: int) -> Batch:
        return _batch(self.tokens, self.chosen(step) * self.context, self.context, self.reset_state)


def sequential(
    tokens: Tokens, batch_size: int, context: int, most: int | None = None, reset_state: bool = False
) -> Iterator[Batch]:
    """One pass in the text's own order: every window once, the last batch perhaps smaller.

    Args:
        most: stop after about that many tokens, at least one window.
    Raises:
        ValueError: the tokens do not fill one window.
    """
    require_window("the validation data", tokens, context)
    windows = (len(tokens.ids) - 1) // context
    if most is not None:
        windows = min(windows, max(1, most // context))
    for first in range(0, windows, batch_size):
        starts = np.arange(first, min(first + batch_size, windows)) * context
        yield _batch(tokens, starts, context, reset_state)


def require_window(what: str, tokens: Tokens, context: int) -> None:
    """Raise ValueError unless there is one window and the token that follows it."""
    if len(tokens.ids) <= context:
        raise ValueError(
            f"{what} has {len(tokens.ids)} tokens, but one window needs {context + 1}; "
            "give more text or a smaller context"
        )


def permute(places: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where permutations of 0 .. size - 1, one for each key, send places.

    A Feistel network on the next power of four, walked until it lands below `size` (Black and Rogaway, 2002, "Ciphers
    with arbitrary finite domains"): random access to a shuffle of any length.

    Args:
        places, keys: (n,) uint64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = places.copy()
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(keys[outside] + np.uint64(turn), right) & mask)
        result[outside] = left << half | right
        outside = result >= size
    return result


def _mix(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of two numbers (the finaliser of SplitMix64, modulo 2^64)."""
    x = a * np.uint64(0x9E3779B97F4A7C15) + b
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _batch(tokens: Tokens, starts: NDArray[np.int64], context: int, reset_state: bool) -> Batch:
    places = starts[:, None] + np.arange(context + 1)
    ids = torch.from_numpy(tokens.ids[places].astype(np.int64))
    seq_idx = None
    if reset_state:
        document = np.searchsorted(tokens.ends, places[:, :-1], side="right")
        seq_idx = torch.from_numpy((document - document[:, :1]).astype(np.int32))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), seq_idx)


def prepare(
    source: str | None,
    tokenizer: Tokenizer,
    cache: Path,
    validation: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Corpus:
    """Tokenise a source once, and open it from the cache from then on.

    Args:
        source: what `Documents` reads, a .bin file of little-endian uint16 tokens in which the tokenizer's end-of-text
            token ends documents, or a folder that this function has written.
        cache: folder of all prepared sources; each lies below it by a fingerprint of source and tokenizer.
        validation: the held-out text; if None, a share of the documents of `source`.
        report: called with the bytes of text read so far and about how many there are.
    Raises:
        FileNotFoundError, ValueError: see `Documents`; a source without text; tokens that the tokenizer does not have.
        OSError: the cache cannot be written.
    """
    if source is not None and (Path(source) / "index.json").is_file():
        return _open(Path(source), tokenizer)
    sources = [Documents(source)] if validation is None else [Documents(source), Documents(validation)]
    described = [FORMAT, HELD_OUT, tokenizer.to_json(), *(documents.fingerprint() for documents in sources)]
    folder = cache / _digest(described)
    if not folder.exists():
        try:
            with new_directory(folder) as beside:
                _write(beside, sources, tokenizer, report)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        for leftover in cache.glob(f".{folder.name}.*"):  # of processes that were killed, or slower
            shutil.rmtree(leftover, ignore_errors=True)
    return _open(folder, tokenizer)


def cache_directory(fallback: Path) -> Path:
    """Where prepared sources are kept: ~/.cache/moemamba (below XDG_CACHE_HOME if set), or `fallback` if unwritable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moemamba"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError:
        return fallback
    return cache


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


def _write(folder: Path, sources: list[Documents], tokenizer: Tokenizer, report: Callable[[int, int], None]) -> None:
    total = sum(documents.bytes for documents in sources)
    done = 0
    with _Writer(folder, "train", tokenizer) as train, _Writer(folder, "validation", tokenizer) as validation:
        for documents, writer in zip(sources, (train, validation), strict=False):
            before = done
            for document in _encoded(documents, tokenizer):
                other = len(sources) == 1 and held_out(document.text, HELD_OUT)
                (validation if other else writer).add(document)
                done += len(document.text)
                report(done, total)
            if done == before:
                raise ValueError(f"there is no text in {documents.name}; give a file or folder with UTF-8 text")
    index = {
        "name": sources[0].name,
        "tokenizer": _digest(tokenizer.to_json()),
        "skipped": sum(len(documents.skipped) for documents in sources),
        "train": train.index(),
        "validation": validation.index(),
    }
    write_json(folder / "index.json", index)


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus:
    index: dict[str, Any] = read_json(folder / "index.json")
    if index["tokenizer"] != _digest(tokenizer.to_json()):
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


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def _encoded(documents: Documents, tokenizer: Tokenizer) -> Iterator[_Encoded]:
    if documents.files and documents.files[0].suffix == ".bin":
        yield from _cut(documents.files[0], tokenizer)
        return
    for texts in _groups(documents):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            yield _Encoded(ids, text.encode())


def _cut(file: Path, tokenizer: Tokenizer) -> Iterator[_Encoded]:
    """The documents of a file of uint16 tokens."""
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
        for end in (*ends, len(ids)) if first + BLOCK >= len(ids) else ends:
            if end > start:
                yield _Encoded(ids[start:end], tokenizer.decode(ids[start:end].tolist()).encode())
            start = end + 1


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
