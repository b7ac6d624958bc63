"""Files: read only after a look at what they are, written so that they appear complete or not at all.

What is wrong with a file's *content* is a `FileError`; what keeps the machine from reading or writing it (no memory, no
right, a disk that fails) is the system's own `OSError`, and never taken for damage.
"""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or choose another place"),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "too many files are open: close some, or raise the limit (ulimit -n)"
    ),
    errno.ENOENT: "its folder is gone: put it back if it was moved, or choose another place",
}
"""of what would help where a file cannot be written"""
JSON_LIMIT = 1 << 20
"""bytes of a JSON file that describes something: a configuration, an index, a position"""


class FileError(ValueError):
    """What a file holds is not what it must be; the message names the file and what would help."""


class ReadError(OSError):
    """A file cannot be read; the message says which, why, and what would help."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class WriteError(OSError):
    """A file cannot be written; the message says which, why, and what would help."""

    reason = ""
    """the system's words alone"""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which a leading `~` is the home folder; stays as it is where there is no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder() -> Path | None:
    """The package's folder for what can be made again: below XDG_CACHE_HOME, else below ~/.cache; None without either.

    It need not exist, and need not be writable.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moemamba"
    try:
        return Path.home() / ".cache" / "moemamba"
    except RuntimeError:  # a user without a name or a home, as in a container
        return None


def check_regular(file: Path, most: int | None = None) -> int:
    """The size in bytes of a regular file.

    Raises:
        FileError: it is a folder, a pipe or a device, which could be read for ever, or larger than `most` bytes.
        OSError: it is missing or cannot be looked at.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{file} is not a regular file; put the file itself there")
    if most is not None and found.st_size > most:
        raise FileError(f"{file} has {found.st_size:,} bytes, more than the {most:,} that such a file can have")
    return found.st_size


def read_text(file: Path, most: int = JSON_LIMIT) -> str:
    """The text of a regular UTF-8 file of at most so many bytes; raises what `check_regular` raises."""
    check_regular(file, most)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); restore it") from error


def parse_json(text: str, where: str, mend: str = "restore it from a copy") -> Any:
    """JSON values; `where` names the text in what is raised, and `mend` says what would help.

    Raises:
        FileError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise FileError(f"{where} is nested too deeply; {mend}") from error
    except ValueError as error:
        raise FileError(f"{where} is not JSON ({error}); {mend}") from error


def read_json(file: Path, most: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object of a regular file of at most so many bytes.

    Raises:
        FileError: it holds anything else.
        OSError: it is missing or cannot be read.
    """
    values = parse_json(read_text(file, most), str(file))
    if not isinstance(values, dict):
        raise FileError(f"{file} must be a JSON object, but holds {type(values).__name__}; restore it from a copy")
    return values


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write an indented JSON object, at once or not at all."""
    replace(file, json.dumps(values, indent=2) + "\n")


def replace(file: Path, content: str | bytes) -> None:
    """Put a file in place of what was there, at once or not at all; raises what `replacing` raises."""
    with replacing(file) as stream:
        stream.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes come in place of what was there: written beside it, flushed to disk, renamed.

    Raises:
        OSError: it cannot be written, named with what would help; what was there before is untouched.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        try:
            with beside.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Says of an OSError raised inside what could not be read, and keeps it from passing for a failure to write, where
    one file is read while another is written."""
    try:
        yield
    except ReadError:
        raise
    except OSError as error:
        why = f"cannot read {source}: {error.strerror}; make it readable, or name another" if error.strerror else error
        raise ReadError(error.errno, str(why)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of an OSError raised inside which file could not be written, and of a full disk what would help."""
    try:
        yield
    except (FileExistsError, ReadError):
        raise
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "choose another place")
        reason = error.reason if isinstance(error, WriteError) else error.strerror or str(error)
        failed = WriteError(
            error.errno, f"cannot write {path}: {reason}; {advice}; nothing that was saved before is lost"
        )
        failed.reason = reason
        raise failed from error


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears at `path` complete or not at all: written beside it, flushed to disk, and renamed.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: the disk is full, or the place cannot be written.
    """
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with writing(path):
            if path.exists():
                raise FileExistsError(f"{path} exists already; choose another place, or remove it")
            shutil.rmtree(beside, ignore_errors=True)  # of a killed process that had our number, as in a container
            beside.mkdir(parents=True)
            yield beside
            for file in (*beside.iterdir(), beside):
                flush(file)
            beside.rename(path)
            flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def vacant(place: str | Path) -> Path:
    """Where a command is to write, with `~` as the home folder, asked before hours are spent; raises FileExistsError if
    there is something."""
    path = expanded(place)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another place (--out), or remove it")
    return path


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable(folder: Path) -> bool:
    """Whether a folder can be made and written to; it is made if it was not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def keep_recent(folder: Path, name: str, most: int) -> None:
    """Of the entries of a cache whose whole name fits a pattern, remove all but those used last (`used`).

    Only files and directories themselves, never what a link points to; what cannot be removed stays, and so does what
    was used within a day, perhaps by a process that still runs.
    """
    since = time.time() - 86_400
    try:
        entries = [each for each in os.scandir(folder) if re.fullmatch(name, each.name) and not each.is_symlink()]
        entries.sort(key=lambda each: each.stat().st_mtime)
        entries = [each for each in entries[: max(0, len(entries) - most)] if each.stat().st_mtime < since]
    except OSError:  # another process removes some too
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(entry.path)


def used(path: Path) -> None:
    """Note that an entry of a cache is in use, for `keep_recent`."""
    with suppress(OSError):
        os.utime(path)
