"""Text in any Unicode encoding, with a byte order mark or without, as a stream of UTF-8."""

import codecs
import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..host.files import FileError
from .packing import unpacked

HEAD = 1 << 20  # bytes that tell what a file is
BLOCK = 1 << 18
MARKS = (  # longest first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def encoding_of(head: bytes) -> tuple[str, int]:
    """What the first HEAD bytes of a text are encoded in, and how many of them are its byte order mark."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name, len(mark)
    return (_utf16(head) or "utf-8") if b"\0" in head else "utf-8", 0


def _utf16(head: bytes) -> str | None:
    """UTF-16 without a mark: zeros in one half of the pairs, hardly in the other, and no control characters."""
    low, high = head[0::2].count(0), head[1::2].count(0)
    name = "utf-16-le" if high > low else "utf-16-be"
    if len(head) % 2 and len(head) < HEAD:
        return None
    if min(low, high) * 4 > max(low, high) or max(low, high) * 8 < len(head) // 2:
        return None
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return None
    allowed = set("\t\n\v\f\r")
    return None if any(unicodedata.category(c) == "Cc" for c in set(text) - allowed) else name


@contextmanager
def as_utf8(file: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The text of a file as UTF-8 without a mark, and where in its own bytes that begins.

    Raises:
        FileError: see `unpacked`; while reading: it is not the UTF-16 or UTF-32 that it begins as. UTF-8 is not
            checked.
    """
    with unpacked(file) as stream:
        name, mark = encoding_of(stream.read(HEAD))
    with unpacked(file) as stream:
        stream.read(mark)
        if name == "utf-8":
            yield stream, mark
            return
        with io.BufferedReader(_Transcoded(stream, file, name, mark), BLOCK) as changed:
            yield changed, mark


class _Transcoded(io.RawIOBase):
    def __init__(self, inner: IO[bytes], file: Path, name: str, position: int):
        self._inner, self._file, self._name, self._position = inner, file, name, position
        self._decoder = codecs.getincrementaldecoder(name)()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = self._inner.read(BLOCK)
            waiting = len(self._decoder.getstate()[0])
            try:
                self._rest = self._decoder.decode(block, final=not block).encode()
            except UnicodeDecodeError as error:
                place = self._position - waiting + error.start
                raise FileError(
                    f"{self._file} begins as {self._name.upper()} text, but byte {place} is none ({error.reason}); "
                    "write it again as UTF-8"
                ) from error
            self._position += len(block)
            if not block:
                break
        found, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)


def text_bytes(file: Path, most: int) -> int:
    """The bytes of a file's text as UTF-8, or `most` where it has more."""
    with as_utf8(file) as (stream, _):
        size = 0
        while size < most and (block := stream.read(BLOCK)):
            size += len(block)
    return min(size, most)


def check_text(file: Path) -> None:
    """Read all of a file; raises FileError unless it is text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with as_utf8(file) as (stream, position):
        block = b" "
        while block:
            block = stream.read(BLOCK)
            decode(block, decoder, file, position)
            position += len(block)


def decode(block: bytes, decoder: codecs.IncrementalDecoder, file: Path, position: int) -> str:
    """The text of the block of UTF-8 at a position of a file; an empty block is its end. Raises FileError."""
    if b"\0" in block:
        place = position + block.index(0)
        raise FileError(
            f"{file} is not text: byte {place} is zero; if it is text all the same, remove zeros with tr -d '\\000'"
        )
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        place = position - waiting + error.start
        raise FileError(
            f"{file} is not UTF-8 text: byte {place} ({error.reason}); convert it, for instance with iconv -t utf-8"
        ) from error
