"""Where text comes from: files, folders, a hub, Python's own library; as a stream of documents."""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Set
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..host.files import FileError, expanded, reading
from .config import HUB
from .encoding import encoding_of, text_bytes
from .hub import HubTexts
from .kinds import TOKENS, Kind, named_kind
from .packing import packed_name, packing_of, unpacked
from .records import Records

STDLIB_SUFFIXES = {".py", ".rst", ".txt"}
# Not the library's own text, or test data; absent from some distributions, so that leaving it out keeps them alike.
STDLIB_WITHOUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
FEW_FILES = 100
LARGEST_PART = 16 << 20  # bytes; bounds memory
SMALLEST_CUT, LARGEST_CUT = 1 << 10, 64 << 10


class Documents:
    """The documents of a source, always in the same order, read as a stream.

    What a file holds is told by its name, upper or lower case, else by its content, alike for a file alone, in a folder
    and packed (`kinds.NAMES`, `packing.PACKINGS`). In JSON lines every line is a document, its "text" field; so is
    every object of a JSON array or of a file of objects, and every row of parquet, which needs pyarrow. Any other text
    is a document, but where there are fewer than 100 files it is cut at line ends into parts of about a hundredth of
    the whole (1 to 64 KiB), so that there is something to hold out; where no line ends, at a space. A line
    `<|endoftext|>` ends a document too. Text is UTF-8, UTF-16 or UTF-32; a byte order mark is no part of it. Null and
    empty documents do not count, half a character becomes U+FFFD.

    Args:
        source: a file, a folder, or a dataset as `HubTexts` names it; Python's standard library if None.
    Attributes:
        files: what is read, in order.
        bytes: their size.
        text_bytes: the size of the text, 0 if it is not known beforehand.
        is_tokens: it holds tokens and not text: a file of them, or a folder of nothing else.
        skipped: files and folders that were left out, and why; complete once the stream has passed them.
        mended: places of texts that held half a character: how many, and the first.
    Raises:
        FileNotFoundError: there is nothing at `source`.
        FileError: while reading, naming file and place: what is no text, or a line that is not a document.
        OSError: a file cannot be read.
    """

    of_ids = False

    def __init__(self, source: str | Path | None):
        if source is not None and not str(source).strip():
            raise ValueError('the data is named "", which is nothing; name a file or a folder, "." for the current one')
        self.skipped: dict[Path, str] = {}
        self.mended: list[tuple[Path, int, str]] = []
        self._unread: dict[Path, str] = {}
        self._folder = True
        self._hub = HubTexts(str(source)) if str(source).startswith(HUB) else None
        self.name = "Python's standard library" if source is None else str(source)
        self.files = [] if self._hub else self._find(source)
        self.bytes = sum(file.stat().st_size for file in self.files)
        self.is_tokens = bool(self.files) and all(named_kind(file) in TOKENS for file in self.files)
        plain = not self.is_tokens and all(
            named_kind(file) is not Kind.PARQUET and not packed_name(file) for file in self.files
        )
        self.text_bytes = self.bytes if plain else 0

    def _find(self, source: str | Path | None) -> list[Path]:
        if source is None:
            files = _walk(Path(sysconfig.get_path("stdlib")), self._unread, STDLIB_WITHOUT, links=False)
            return [file for file in files if file.suffix in STDLIB_SUFFIXES]
        root = expanded(source)
        if root.is_dir():
            return _walk(root, self._unread)
        if not root.is_file():
            if root.exists():
                raise FileError(f"{source} is neither a file nor a folder; name one of these")
            raise FileNotFoundError(f"there is no data at {source}; name {kinds_in_words()}, or a folder of such files")
        self._folder = False
        return [root]

    @cached_property
    def _part(self) -> int:
        """About how many bytes plain text is cut into. A text has the same parts however it is packed and encoded."""
        if len(self.files) >= FEW_FILES:
            return LARGEST_PART
        size = 0
        for file in self.files:
            size += _text_size(file, 100 * LARGEST_CUT - size)
        return min(max(size // 100, SMALLEST_CUT), LARGEST_CUT)

    def fingerprint(self) -> list[Any]:
        """Changes whenever a file does: paths, sizes and times of change."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        if self._hub is not None:  # what a name stands for is taken not to change
            return [self.name]
        return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]

    def __iter__(self) -> Iterator[str]:
        if self._hub is not None:
            yield from self._hub
        for records in self.opened():
            yield from records
            if records.mended:
                self.mended.append((records.file, records.mended, records.first_mended))

    def ids(self) -> Iterator[Any]:
        """None: see `tokenfiles` for files of them."""
        return iter(())

    def opened(self) -> Iterator[Records]:
        """Each file that can be read; of a folder the others are left out, and a single one is an error."""
        self.skipped = dict(self._unread)
        self.mended.clear()
        for file in self.files:
            try:
                records = Records(file, self._part)
                if records.kind in TOKENS and not self.is_tokens:
                    raise FileError(f"{file} holds tokens among texts; name it alone, or in a folder of tokens")
            except FileError as error:
                if not self._folder:
                    raise
                self.skipped[file] = str(error).removeprefix(f"{file} ").partition(";")[0]
                continue
            yield records

    def notes(self) -> tuple[str, ...]:
        """What a reader should know of how it was read, in sentences."""
        found = [f"{file} {reason}" for file, reason in islice(self.skipped.items(), 5)]
        if len(self.skipped) > 5:
            found.append(f"and {len(self.skipped) - 5:,} more")
        left_out = [f"{len(self.skipped):,} left out: {'; '.join(found)}"] if found else []
        halves = [
            f"{file}: {count:,} documents held half a character, now U+FFFD, the first in {place}"
            for file, count, place in self.mended[:5]
        ]
        return (*left_out, *halves)


def kinds_in_words() -> str:
    """What a file of data can be, for messages."""
    return "a text file, JSON lines (.jsonl), JSON, parquet, tokens (.u16.bin, .u32.bin)"


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document belongs to the validation data: by its content, so that copies go together, for ever."""
    return hash_of(document) < share * 2**64


def hash_of(document: bytes) -> int:
    """64 bits of a document's content."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def _text_size(file: Path, most: int) -> int:
    """The size of a file's text as UTF-8, as far as that is text; at most `most`."""
    try:
        with reading(file):
            packed = packing_of(file)
            with unpacked(file) as stream:
                encoding = encoding_of(stream.read(most if packed else 1 << 12))
            if packed or encoding != ("utf-8", 0):
                return text_bytes(file, most)
    except FileError:  # which is said when the file is read
        pass
    return min(file.stat().st_size, most)


def _walk(root: Path, unread: dict[Path, str], without: Set[str] = frozenset(), links: bool = True) -> list[Path]:
    """All files below, sorted by path; hidden ones, caches of Python and folders named in `without` left out.

    Folders that are links are walked too (unless not `links`), after all others, and every folder once: links can go
    round in circles. What cannot be read is put into `unread`.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [str(root)]

    def missed(error: OSError) -> None:
        unread[Path(error.filename)] = f"cannot be read ({error.strerror})"

    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0), onerror=missed):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                unread[Path(folder)] = "is a link to a folder that is read already"
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [n for n in folders if not (n.startswith(".") or n == "__pycache__" or n in without)]
            if links:
                waiting += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            found += [path for name in names if _is_file(path := os.path.join(folder, name), unread)]
        waiting.sort()
    return [Path(file) for file in sorted(found)]


def _is_file(path: str, unread: dict[Path, str]) -> bool:
    """Whether a file of a folder is to be read; what should be and cannot is put into `unread`."""
    if os.path.basename(path).startswith("."):
        return False
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return True
        unread[Path(path)] = "is not a regular file"
    except OSError as error:
        unread[Path(path)] = f"cannot be read ({error.strerror})"
    return False
