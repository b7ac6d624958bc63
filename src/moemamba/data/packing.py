"""Files of bytes, whatever they are packed with: read as a stream in bounded memory, damage named with the file."""

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from ..host.files import FileError, check_regular

BLOCK = 1 << 18
RAW = {".bin", ".u16", ".u32"}  # of files that may begin with any bytes, those of a packed file too
XZ_MEMORY = 256 << 20  # bytes that unpacking may take; xz -9 takes 65 MiB, but a file may ask for 4 GiB
LARGEST_RATIO = 1000  # of a packed file that has to be unpacked onto the disk


class _Xz(io.RawIOBase):
    """An xz stream, or several one after the other, unpacked with a limit on memory, which LZMAFile lacks."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self._rest = raw, b""
        self._begin()

    def _begin(self) -> None:
        self._inner = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._inner.eof:
                self._rest = (self._inner.unused_data or self._raw.read(BLOCK)).lstrip(b"\0")  # padding between streams
                if not self._rest:
                    return 0
                self._begin()
            rest = self._rest
            if self._inner.needs_input and not rest and not (rest := self._raw.read(BLOCK)):
                raise EOFError("it ends too early")
            self._rest = b""
            found = self._inner.decompress(rest, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


def _gzip(raw: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile("", "rb", fileobj=raw)


def _zstandard(raw: IO[bytes]) -> IO[bytes]:
    try:
        pyarrow: Any = import_module("pyarrow")
    except ImportError:
        raise _Missing from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")


class _Missing(Exception):
    """A package is not installed."""


@dataclass(frozen=True)
class Packing:
    """A way to compress a file."""

    name: str
    command: str
    """what unpacks it"""
    suffixes: frozenset[str]
    begins: re.Pattern[bytes]
    """how every such file begins"""
    open: Callable[[IO[bytes]], Any]


PACKINGS = (
    Packing("gzip", "gunzip", frozenset({".gz", ".gzip"}), re.compile(rb"\x1f\x8b"), _gzip),
    Packing("bzip2", "bunzip2", frozenset({".bz2"}), re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    Packing("xz", "unxz", frozenset({".xz"}), re.compile(rb"\xfd7zXZ\0"), _Xz),
    Packing("zstd", "unzstd", frozenset({".zst", ".zstd"}), re.compile(rb"\x28\xb5\x2f\xfd"), _zstandard),
)


def packed_name(file: Path) -> Packing | None:
    """The packing that a name tells of, upper or lower case."""
    return next((packing for packing in PACKINGS if file.suffix.lower() in packing.suffixes), None)


def packing_of(file: Path) -> Packing | None:
    """How a file is packed: as its name tells, else by how it begins."""
    named = packed_name(file)
    if named or file.suffix.lower() in RAW:
        return named
    with file.open("rb") as raw:
        head = raw.read(16)
    return next((packing for packing in PACKINGS if packing.begins.match(head)), None)


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked while they are read.

    Raises:
        FileError: here or while reading, naming the file: it is no regular file, not what its name tells, or damaged.
        OSError: it cannot be read.
    """
    check_regular(file)
    packing = packing_of(file)
    with file.open("rb") as raw:
        if packing is None:
            yield raw
            return
        try:
            inner = packing.open(raw)
        except _Missing:
            raise FileError(
                f"{file} is packed with {packing.name}, which needs the package pyarrow: pip install 'moemamba[data]', "
                f"or unpack it with {packing.command}"
            ) from None
        with inner, io.BufferedReader(_Named(inner, file, packing), BLOCK) as stream:
            yield stream


class _Named(io.RawIOBase):
    """A stream of unpacked bytes whose errors name the file."""

    def __init__(self, inner: Any, file: Path, packing: Packing):
        self._inner, self._file, self._packing = inner, file, packing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._inner.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is None:  # of the libraries that unpack, not of the system
                raise self._damaged(error) from error
            raise
        buffer[: len(found)] = found
        return len(found)

    def _damaged(self, error: Exception) -> FileError:
        return FileError(
            f"{self._file} is not a complete {self._packing.name} file ({error}); write it again, or unpack it with "
            f"{self._packing.command}"
        )


@contextmanager
def seekable(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file for a reader that jumps about: a packed one is unpacked onto the disk for the time.

    Raises:
        FileError: see `unpacked`; it unpacks to more than a thousand times its size.
        OSError: it cannot be read, or there is no room to unpack it.
    """
    with unpacked(file) as stream:
        if packing_of(file) is None:
            yield stream
            return
        most = LARGEST_RATIO * file.stat().st_size
        with tempfile.TemporaryFile() as whole:
            while block := stream.read(BLOCK):
                most -= len(block)
                if most < 0:
                    raise FileError(f"{file} unpacks to more than {LARGEST_RATIO:,} times its size; unpack it yourself")
                whole.write(block)
            whole.seek(0)
            yield whole
