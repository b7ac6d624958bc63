"""The documents of one file, whatever its kind: what is wrong is said with the file and the place in it."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..host.files import FileError, reading
from .encoding import as_utf8, decode
from .kinds import TOKENS, Kind, kind_of
from .packing import seekable, unpacked

DOCUMENT_MARK = re.compile(r"^<\|endoftext\|>\s*?(?:\n|\Z)", re.MULTILINE)
LARGEST = 32 << 20  # bytes of one document of JSON; bounds memory
BLOCK = 1 << 20
FAR = 16  # times the size of a part: how far on a line end is looked for
TOKEN_BLOCK = 1 << 20  # tokens


class Records:
    """The documents of a file.

    Args:
        size: about how many bytes plain text is cut into; see `Documents`.
    Attributes:
        kind: of the file; see `kind_of`.
        mended: documents that held half a character, which became U+FFFD.
        first_mended: the place of the first of them.
    Raises:
        FileError: here or while reading, naming file and place: nothing that can be read, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path, size: int):
        with reading(file):
            self.file, self.kind, self._size = file, kind_of(file), size
        self.mended = 0
        self.first_mended = ""

    def __iter__(self) -> Iterator[str]:
        with reading(self.file):
            if self.kind is Kind.TEXT:
                yield from _text(self.file, self._size)
            else:
                found = {Kind.PARQUET: _parquet, Kind.LINES: _json_lines}.get(self.kind, _json_values)
                yield from self._clean(found(self.file))

    def _clean(self, found: Iterator[tuple[str, Any]]) -> Iterator[str]:
        """The one rule for texts of records: null and empty ones do not count, half a character becomes U+FFFD."""
        for place, text in found:
            whole = whole_text(text, f"{self.file}, {place}")
            if whole != text and text is not None:
                self.mended += 1
                self.first_mended = self.first_mended or place
            if whole:
                yield whole

    def tokens(self) -> Iterator[NDArray[Any]]:
        """Blocks of TOKEN_BLOCK tokens, the last perhaps shorter."""
        assert self.kind in TOKENS
        dtype = np.dtype("<u2" if self.kind is Kind.U16 else "<u4")
        with reading(self.file), unpacked(self.file) as stream:
            while block := _exactly(stream, TOKEN_BLOCK * dtype.itemsize):
                if len(block) % dtype.itemsize:
                    raise FileError(
                        f"{self.file} ends inside a token; it must hold {self.kind.value}, {dtype.itemsize} bytes each"
                    )
                yield np.frombuffer(block, dtype)


def whole_text(text: Any, where: str) -> str:
    """A document's text as UTF-8 can hold it, "" for null; raises FileError for what is no text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise FileError(f'{where}: its "text" is {_named(text)}, not a string; write a string, or null')
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # half a character, which JSON can spell and UTF-8 cannot
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    """So many bytes, fewer at the end alone."""
    found = stream.read(size)
    while len(found) < size and (more := stream.read(size - len(found))):
        found += more
    return found


def _text(file: Path, size: int) -> Iterator[str]:
    """A file's text in documents: cut at marks and, where there is none for `size` bytes, at a line end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with as_utf8(file) as (stream, position):
        for block in _parts(stream, size):
            *whole, rest = DOCUMENT_MARK.split(rest + decode(block, decoder, file, position))
            if not whole:
                whole, rest = [rest], ""
            yield from filter(None, whole)
            position += len(block)
    yield from filter(None, [rest])


def _parts(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """All of a stream in parts that end at the first line end after `size` bytes, and one that is empty.

    Where no line ends far and wide, at a space, or else between characters.
    """
    ahead = b""
    while True:
        ahead += _exactly(stream, size - len(ahead)) if len(ahead) < size else b""
        end = ahead.find(b"\n", size) + 1
        if not end:
            ahead += stream.readline(max(0, min(FAR * size, BLOCK) + size - len(ahead)))
            end = len(ahead) if ahead.endswith(b"\n") or len(ahead) <= 2 * size else _cut(ahead, size)
        yield ahead[:end]
        if not end:
            return
        ahead = ahead[end:]


def _cut(text: bytes, size: int) -> int:
    """Where to cut a text without line ends: from `size` on after a carriage return, a space, or any character."""
    for space in (rb"\r", rb"[ \t]"):
        if found := re.compile(space).search(text, size, 2 * size):
            return found.end()
    while size < len(text) and 0x80 <= text[size] < 0xC0:
        size += 1
    return size


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with as_utf8(file) as (stream, _):
        number = 0
        while line := stream.readline(LARGEST + 1):
            number += 1
            where = f"{file}, line {number}"
            if len(line) > LARGEST:
                raise FileError(f"{where} is longer than {LARGEST >> 20} MiB; write one document a line, or divide it")
            if line.strip():
                yield f"line {number}", _field(_parsed(line.removeprefix(codecs.BOM_UTF8), where), where, "line")


def _parsed(line: bytes, where: str) -> Any:
    wanted = 'every line must be a JSON object with a string "text"'
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise FileError(f"{where}: {wanted}; it is not UTF-8") from None
    except RecursionError:
        raise FileError(f"{where}: {wanted}; it is nested too deeply") from None
    except ValueError as error:
        raise FileError(f"{where}: {wanted}; it is not JSON ({error})") from None


def _field(values: Any, where: str, what: str) -> Any:
    """The "text" of a JSON object."""
    wanted = f'every {what} must be a JSON object with a string "text"'
    if not isinstance(values, dict):
        raise FileError(f"{where}: {wanted}; it is {_named(values)}")
    if "text" not in values:
        raise FileError(f"{where}: {wanted}; it has {', '.join(values) or 'nothing'}")
    return values["text"]


def _named(value: Any) -> str:
    """What a JSON value is."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """The "text" of objects in a JSON array, or one after the other."""
    with as_utf8(file) as (stream, begin):
        ahead = _Ahead(file, stream, begin)
        close = "[" if ahead.skip() == "[" else ""
        if close:
            ahead.at += 1
        for number in itertools.count(1):
            if (next_ := ahead.skip("," if number > 1 else "")) in ("", "]"):
                break
            where = f"document {number}"
            yield where, _field(ahead.value(where), f"{file}, {where}", "document")
        if close:
            ahead.at += 1
        if bool(close) != (next_ == "]") or ahead.skip():
            raise FileError(f"{file} is not whole JSON: it ends early, or goes on, after document {number - 1}")


class _Ahead:
    """What has been read of a file of JSON, and the place in it."""

    def __init__(self, file: Path, stream: IO[bytes], position: int):
        self._file, self._stream, self._position = file, stream, position
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._ended = False
        self.at = 0

    def skip(self, more: str = "") -> str:
        """Go on to what is neither space nor among `more`; that character, "" at the end."""
        while True:
            while self.at < len(self._text):
                if (character := self._text[self.at]) not in " \t\r\n" + more:
                    return character
                self.at += 1
            if self._ended:
                return ""
            self._read()

    def value(self, where: str) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, self.at = self._json.raw_decode(self._text, self.at)
                return value
            except RecursionError:
                raise FileError(f"{self._file}, {where} is nested too deeply") from None
            except ValueError as error:
                if self._ended:
                    raise FileError(f"{self._file}, {where} is not JSON ({error})") from None
                if len(self._text) - self.at > LARGEST:
                    raise FileError(f"{self._file}, {where} is not JSON, or longer than {LARGEST >> 20} MiB") from None
                self._read()

    def _read(self) -> None:
        """As much again as has been read but not used, so that a long value is tried a few times only."""
        self._text, self.at = self._text[self.at :], 0
        block = _exactly(self._stream, max(BLOCK, len(self._text)))
        self._text += decode(block, self._utf8, self._file, self._position)
        self._position += len(block)
        self._ended = not block


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise FileError(f"{file} needs the package pyarrow: pip install 'moemamba[data]'") from None
    row, opened = 0, False
    with seekable(file) as stream:
        try:
            with parquet.ParquetFile(stream) as table:
                opened = True
                _check_column(file, table.schema_arrow)
                for batch in table.iter_batches(256, columns=["text"]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield f"row {row}", text
        except FileError:
            raise
        except (ValueError, OSError) as error:  # of which pyarrow's own errors are kinds
            if isinstance(error, OSError) and error.errno is not None:
                raise
            place = f"is damaged after row {row}" if opened else "is not a parquet file"
            raise FileError(f"{file} {place} ({_first_line(error)}); write it again, or rename it") from error


def _check_column(file: Path, schema: Any) -> None:
    if "text" not in schema.names:
        raise FileError(f'{file} has no column "text"; it has {", ".join(schema.names)}; rename the one that is meant')
    kind = schema.field("text").type
    if not any(name in str(kind) for name in ("string", "null")):
        raise FileError(f'{file} has a column "text" of {kind}; it must hold strings')


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
