"""Folders of tokens: what lies in them, and opening them, after which every number in them can be relied upon."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..host.files import FileError, check_regular, expanded, read_json
from ..reading import from_dict, validate
from ..text import Tokenizer, load_tokenizer
from .batches import Tokens

PARTS = ("train", "validation")
BLOCK = 1 << 22  # tokens looked at together
REMEMBERED = 1 << 28  # bytes of token files from which a look at all of them is remembered


@dataclass(frozen=True)
class Part:
    """What index.json says of the tokens of one side."""

    tokens: int
    documents: int
    bytes: int
    """of UTF-8 text"""
    dtype: Literal["<u2", "<u4"]
    content: str
    """hash of the tokens"""
    spelled: float = 1.0
    """bytes that the tokens decode to, for each byte of the text; measured on a part of it"""

    def __post_init__(self) -> None:
        validate(self, positive=("spelled",), not_negative=("tokens", "documents", "bytes"))
        if not self.documents <= self.tokens or (self.documents == 0) != (self.tokens == 0):
            raise ValueError(f"{self.documents:,} documents cannot have {self.tokens:,} tokens")
        if (self.bytes == 0) != (self.documents == 0):
            raise ValueError(f"{self.documents:,} documents cannot have {self.bytes:,} bytes")


@dataclass(frozen=True)
class Index:
    """The index.json of a folder of tokens."""

    name: str
    """of the source"""
    tokenizer: str
    """its digest"""
    skipped: int
    """files that were left out"""
    train: Part
    validation: Part
    lost: float = 0.0
    """share of the text's bytes that its tokens do not spell, measured on a part of it; 0 from older versions"""
    notes: tuple[str, ...] = ()
    """what was left out or changed while the text was read"""

    def __post_init__(self) -> None:
        validate(self, not_negative=("skipped", "lost"))


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens of one source."""

    name: str
    train: Tokens
    validation: Tokens
    """empty if nothing was held out"""
    content: str
    """hash of the training tokens"""
    skipped: int = 0
    """files that were left out"""
    lost: float = 0.0
    """share of the text's bytes that its tokens do not spell"""
    notes: tuple[str, ...] = field(default=())
    """what was left out or changed while the text was read, in sentences"""


def is_prepared(source: str | Path | None) -> bool:
    """Whether a source is a folder of tokens, be it an incomplete one."""
    if source is None or not str(source).strip():
        return False
    folder = expanded(source)
    there = {name for name in ("index.json", "train.bin", "train.ends") if (folder / name).is_file()}
    return len(there) >= 2


def open_prepared(folder: Path, tokenizer: Tokenizer, cache: Path | None = None) -> Corpus:
    """Open a folder of tokens, and check all of it: what a model reads is within bounds.

    Args:
        cache: folder in which it is remembered that large files have been looked at; None: they were just written.
    Raises:
        FileError: the folder is incomplete or damaged, with what is wrong.
        ValueError: the tokens are another tokenizer's.
        OSError: it cannot be read.
    """
    file = folder / "index.json"
    index = from_dict(Index, _read(file), str(file))
    if not _same(index, folder, tokenizer):
        raise ValueError(f"{folder} was prepared with another tokenizer; give that one, or prepare the text again")
    parts = [_tokens(folder, name, getattr(index, name), index, tokenizer) for name in PARTS]
    if cache is not None:
        _look(folder, parts, tokenizer, cache)
    return Corpus(index.name, parts[0], parts[1], index.train.content, index.skipped, index.lost, index.notes)


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileNotFoundError:
        raise _damaged(file.parent, "index.json is missing") from None


def _same(index: Index, folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder was prepared with a tokenizer, whose text other versions may write in other ways."""
    own = tokenizer.to_json()
    if index.tokenizer == digest(own):
        return True
    return (folder / "tokenizer.json").is_file() and load_tokenizer(folder / "tokenizer.json").to_json() == own


def _tokens(folder: Path, name: str, part: Part, index: Index, tokenizer: Tokenizer) -> Tokens:
    ids = _map(folder / f"{name}.bin", part.dtype, part.tokens)
    ends = _map(folder / f"{name}.ends", "<i8", part.documents)
    return Tokens(ids, ends, part.bytes, tokenizer, index.lost, part.spelled)


def _map(file: Path, dtype: str, size: int) -> NDArray[Any]:
    """A file of so many numbers as an array; an empty file cannot be mapped."""
    try:
        found = check_regular(file)
    except FileNotFoundError:
        raise _damaged(file.parent, f"{file.name} is missing") from None
    if found != size * np.dtype(dtype).itemsize:
        raise _damaged(file.parent, f"{file.name} has {found:,} bytes in place of {size * np.dtype(dtype).itemsize:,}")
    return np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)


def _look(folder: Path, parts: list[Tokens], tokenizer: Tokenizer, cache: Path) -> None:
    """Check the numbers in the files, of large ones only if they have changed since they were checked last."""
    files = [folder / f"{name}{suffix}" for name in PARTS for suffix in (".bin", ".ends")]
    stats = [file.stat() for file in files]
    seen = [[s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]
    mark = cache / "checked" / digest([seen, tokenizer.vocab_size, tokenizer.end_of_text])
    large = sum(s.st_size for s in stats) >= REMEMBERED
    if large and mark.exists():
        return
    for name, tokens in zip(PARTS, parts, strict=True):
        if fault := _fault(tokens, tokenizer):
            raise _damaged(folder, f"{name}{fault}")
    if large:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:  # then they are checked again the next time
            pass


def _fault(tokens: Tokens, tokenizer: Tokenizer) -> str | None:
    """What is wrong with the numbers of one side."""
    before, ids, ends = 0, tokens.ids, tokens.ends
    for first in range(0, len(ends), BLOCK):
        block = np.asarray(ends[first : first + BLOCK])
        if block[0] <= before or not (block[1:] > block[:-1]).all() or block[-1] > len(ids):
            return ".ends does not hold rising ends of documents"
        if not (ids[block - 1] == tokenizer.end_of_text).all():
            return ".ends does not hold the places of the end-of-text token"
        before = int(block[-1])
    if before != len(ids):
        return ".ends does not hold the end of the last document"
    for first in range(0, len(ids), BLOCK):
        if (largest := int(ids[first : first + BLOCK].max())) >= tokenizer.vocab_size:
            return f".bin holds the token {largest}, but the tokenizer has {tokenizer.vocab_size}"
    return None


def _damaged(folder: Path, what: str) -> FileError:
    return FileError(f"the prepared tokens in {folder} are incomplete; remove that folder and start again ({what})")
