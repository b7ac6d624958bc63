"""The terminal: what is shown there cannot command it, and what cannot be shown ends no work.

Texts, names and what a model writes may hold characters that move the cursor, set the window's title or worse:
`visible` shows them as they are written in Python. A reader that leaves, a full disk below a log, a closed terminal and
an encoding without some character are matters of showing alone: `Display` bears them.
"""

import codecs
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

# C0 and C1 controls and DEL; bytes of a file's name that are not in its encoding, as Python's surrogateescape has them.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROLS |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(128, 256)}
_IN_A_LINE = _CONTROLS | {ord("\n"): "\\n", ord("\t"): "\\t"}

# What stands for characters of ours where an encoding lacks them.
_NEAREST = {"×": "x", "−": "-", "–": "-", "…": "...", "’": "'", "“": '"', "”": '"', "≤": "<=", "≥": ">=", "±": "+-"}


def visible(text: str, line: bool = False) -> str:
    """Text for a terminal, control characters written as escapes (`\\x1b`); only "\\n" and "\\t" keep their meaning.

    Args:
        line: it is a part of one line, such as a name: "\\n" and "\\t" are escaped too.
    """
    return text.translate(_IN_A_LINE if line else _CONTROLS)


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_NEAREST.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


NEAREST = "moemamba.nearest"
codecs.register_error(NEAREST, _nearest)  # the `errors` of a stream that must not fail


class Display:
    """A stream that work is shown on. Once it cannot be written it is silent, and the work goes on.

    Args:
        stream: None if it was closed before the process began.
        needed: what is written is all that is wanted, as of `moemamba info`: then its loss is an error.
    Raises:
        BrokenPipeError: only if needed: the reader has left.
        OSError: only if needed: it cannot be written.
    """

    def __init__(self, stream: TextIO | None, needed: bool = False):
        self._stream, self._needed = stream, needed
        self.lost: str | None = None if stream is not None else "it is closed"
        """why it is silent"""

    def write(self, text: str) -> int:
        if self._stream is not None and self.lost is None:
            try:
                self._write(self._stream, text)
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, NEAREST).decode(encoding))

    def flush(self) -> None:
        if self._stream is not None and self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self.lost is None and self._stream.isatty()
        except ValueError:  # closed meanwhile
            return False

    def _lose(self, error: OSError | ValueError) -> None:
        if isinstance(error, BlockingIOError):  # a reader that is slow: some of the text is lost, no more
            return
        self.lost = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if self._needed and isinstance(error, BrokenPipeError):
            raise error
        if self._needed:
            number = error.errno if isinstance(error, OSError) else None
            raise OSError(number, f"standard output cannot be written: {self.lost}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def display(needed: bool = False) -> Display:
    """Standard output as a `Display`, which it may be already."""
    stream: Any = sys.stdout
    return stream if isinstance(stream, Display) else Display(stream, needed)


def say(text: str) -> None:
    """A line on standard error, if there is one that can be written."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(visible(text), file=sys.stderr, flush=True)


def open_streams() -> None:
    """Make the standard streams ready: one that is closed is the null device, and no character is too much for them.

    Without the first, the next file that is opened would get the number of standard output, and what libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, it stays open
            if stream.fileno() == number:
                os.set_inheritable(number, True)
            setattr(sys, name, stream)
        if mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=NEAREST if number == 1 else "backslashreplace")


def flush_streams() -> None:
    """Write what is still held back; where that fails, drop it, for Python would complain at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
