"""Where text comes from: files, folders, JSON lines, parquet, a hub, Python's own library; as a stream of documents."""

import codecs
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Set
from importlib import import_module
from pathlib import Path
from typing import Any

from ..host.files import expanded
from .hub import PREFIX, HubTexts

STDLIB_SUFFIXES = {".py", ".rst", ".txt"}
# Not the library's own text, or test data; absent from some distributions, so that leaving it out keeps them alike.
STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
JSON_LINES = {".jsonl", ".ndjson"}
PACKED = {".gz", ".parquet"}
DOCUMENT_MARK = re.compile(r"^<\|endoftext\|>\s*?(?:\n|\Z)", re.MULTILINE)
FEW_FILES = 100
LARGEST_PART = 16 << 20  # bytes; bounds memory
BLOCK = 1 << 20


class Documents:
    """The documents of a source, always in the same order, read as a stream.

    A file is a document, but where there are fewer than 100 files of plain text they are cut at line ends into parts of
    about a hundredth of the whole (1 to 64 KiB), so that there is something to hold out. A line `<|endoftext|>` ends
    a document too. In JSON lines (also .jsonl.gz) every line is a document, its "text" field; in parquet, which needs
    pyarrow, every row. Empty documents do not count.

    Args:
        source: a text file, JSON lines, parquet, a folder of such files, or a dataset as `HubTexts` names it; Python's
            standard library if None.
    Attributes:
        files: what is read, in order.
        bytes: their size.
        text_bytes: the size of the text, 0 if it is not known beforehand.
        is_tokens: it is a .bin file, of tokens and not of text.
        skipped: files of the folder that are not UTF-8 text, known once the stream has passed them.
    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: while reading, naming file and place: text that is not UTF-8, a line that is not a document.
    """

    def __init__(self, source: str | Path | None):
        self.skipped: list[Path] = []
        self._folder = True
        self.is_tokens = False
        self._hub = HubTexts(str(source)) if str(source).startswith(PREFIX) else None
        if self._hub is not None:
            self.name, self.files = str(source), []
        elif source is None:
            self.name, root = "Python's standard library", Path(sysconfig.get_path("stdlib"))
            self.files = [file for file in _files(root, STDLIB_WITHOUT) if file.suffix in STDLIB_SUFFIXES]
        elif (root := expanded(source)).is_dir():
            self.name, self.files = str(source), _files(root)
        elif root.is_file():
            self.name, self.files, self._folder = str(source), [root], False
            self.is_tokens = root.suffix == ".bin"
        else:
            raise FileNotFoundError(f"there is no data at {source}; give a text file, a .jsonl file or a folder")
        self.bytes = sum(file.stat().st_size for file in self.files)
        packed = self.is_tokens or any(file.suffix in PACKED for file in self.files)
        self.text_bytes = 0 if packed else self.bytes
        few = len(self.files) < FEW_FILES
        self._part = min(max(self.bytes // 100, 1 << 10), 64 << 10) if few else LARGEST_PART

    def fingerprint(self) -> list[Any]:
        """Changes whenever a file does: paths, sizes and times of change."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        if self._hub is not None:  # what a name stands for is taken not to change
            return [self.name]
        return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        if self._hub is not None:
            yield from self._hub
        for file in self.files:
            if file.suffix == ".parquet":
                yield from _parquet(file)
            elif file.suffixes[-2:] in ([".jsonl", ".gz"], [".json", ".gz"]):
                yield from _json_lines(file)
            elif self._folder and not _is_text(file):
                self.skipped.append(file)
            elif file.suffix in JSON_LINES or (file.suffix == ".json" and not self._folder):
                yield from _json_lines(file)
            else:
                yield from _text(file, self._part)


def held_out(document: bytes, share: float) -> bool:
    """Whether a document belongs to the validation data: by its content, so that copies go together, for ever."""
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _files(root: Path, without: Set[str] = frozenset()) -> list[Path]:
    """All files below, sorted by path; hidden ones, caches of Python and folders named in `without` left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if not (name.startswith(".") or name == "__pycache__" or name in without)
        ]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return [Path(file) for file in sorted(found) if os.path.isfile(file)]


def _is_text(file: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        try:
            while block := stream.read(BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _text(file: Path, size: int) -> Iterator[str]:
    """A file's text in documents: cut at marks and, where there is none for `size` bytes, at a line end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    rest = ""
    with file.open("rb") as stream:
        while True:
            block = stream.read(size) + stream.readline(BLOCK)  # bounded: a file may be one endless line
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8 text: byte {position - waiting + error.start} ({error.reason}); "
                    "convert it, for instance with iconv -t utf-8"
                ) from None
            position += len(block)
            *whole, rest = DOCUMENT_MARK.split(rest + text)
            if not whole:
                whole, rest = [rest], ""
            yield from filter(None, whole)
            if not block:
                return


def _json_lines(file: Path) -> Iterator[str]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        for number, line in enumerate(_whole(file, stream), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode())["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                wanted = 'every line must be a JSON object with a string "text"'
                raise ValueError(f"{file}, line {number}: {wanted}; {_fault(line, error)}") from None
            if text:
                yield text


def _whole(file: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that may be compressed; raises ValueError where it is damaged."""
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is not a complete gzip file ({error}); write it again, or decompress it") from None


def _fault(line: bytes, error: Exception) -> str:
    """What is wrong with a line of JSON lines."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, ValueError):
        return f"it is not JSON ({error})"
    values = json.loads(line)
    if not isinstance(values, dict):
        return f"it is a {type(values).__name__}"
    return 'its "text" is not a string' if "text" in values else f"it has {', '.join(values) or 'nothing'}"


def _parquet(file: Path) -> Iterator[str]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"{file} needs the package pyarrow: pip install 'moemamba[data]'") from None
    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:  # of which pyarrow's own errors are a kind
        raise ValueError(f"{file} is not a parquet file ({error}); write it again, or rename it") from None
    with table:
        if "text" not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(f'{file} has no column "text"; it has {names}')
        for batch in table.iter_batches(256, columns=["text"]):
            texts = list(filter(None, batch.column(0).to_pylist()))
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f'{file} has a column "text" of {batch.schema.types[0]}; it must hold strings')
            yield from texts
