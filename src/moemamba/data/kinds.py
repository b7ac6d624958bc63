"""What a file holds: as its name tells, else by its content; the same for a file, in a folder and packed."""

import json
import re
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from ..host.files import FileError
from .encoding import HEAD, check_text, encoding_of
from .packing import packed_name, unpacked


class Kind(Enum):
    """What a file holds."""

    TEXT = "plain text"
    LINES = "JSON lines"
    VALUES = "JSON"
    PARQUET = "parquet"
    U16 = "uint16 tokens"
    U32 = "uint32 tokens"


# The table of names, without what packs a file (packing.py). Every other name, .json too, is known by its content.
NAMES = {
    ".txt": Kind.TEXT,
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".parquet": Kind.PARQUET,
    ".u16.bin": Kind.U16,
    ".u32.bin": Kind.U32,
    ".u16": Kind.U16,
    ".u32": Kind.U32,
    ".bin": Kind.U16,
}
TOKENS = {Kind.U16, Kind.U32}
# What people have in their folders and cannot be read as it is: how it begins, what it is and what would help.
FOREIGN = (
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it first"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive; unpack it first"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive; unpack it first"),
    (re.compile(rb"%PDF-"), "a PDF; extract its text first"),
    (re.compile(rb"ARROW1|\xff\xff\xff\xff.{4}\x10", re.DOTALL), "an Arrow file; write it as parquet or JSON lines"),
)
FOREIGN_TOKENS = (
    (re.compile(rb"\x93NUMPY"), 'an array of numpy; write it with array.astype("<u4").tofile("tokens.u32.bin")'),
    (re.compile(rb"%s...\0|%s...\0", re.DOTALL), "a file of llm.c; cut its header off, the first 1,024 bytes"),
)


def named_kind(file: Path) -> Kind | None:
    """The kind that a name tells of, upper or lower case; None if it tells of none."""
    name = PurePath(file.name.lower())
    suffixes = name.suffixes[:-1] if packed_name(file) else name.suffixes
    return NAMES.get("".join(suffixes[-2:])) or NAMES.get("".join(suffixes[-1:]))


def kind_of(file: Path) -> Kind:
    """What a file holds.

    Raises:
        FileError: nothing that can be read, with the reason; a text is read once to know.
        OSError: it cannot be read.
    """
    with unpacked(file) as stream:
        head = stream.read(HEAD)
    named = named_kind(file)
    for begins, what in FOREIGN_TOKENS if named in TOKENS else FOREIGN + FOREIGN_TOKENS:
        if begins.match(head):
            raise FileError(f"{file} is {what}")
    kind = named or (Kind.PARQUET if head.startswith(b"PAR1") else _json_kind(file, head) or Kind.TEXT)
    if kind is Kind.TEXT:
        check_text(file)
    return kind


def _json_kind(file: Path, head: bytes) -> Kind | None:
    """LINES or VALUES if documents stand there, objects with a "text"; None for any other JSON, and for no JSON."""
    encoding, mark = encoding_of(head)
    text = head[mark:].decode(encoding, errors="ignore").lstrip()
    if not text.startswith(("{", "[")):
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    first = _json(lines[0])
    if isinstance(first, dict) and "text" in first:
        return Kind.LINES
    if isinstance(first, dict) and len(lines) > 1 and lines[1].startswith("{"):
        raise FileError(
            f'{file} holds JSON lines without a "text"; they have {", ".join(first) or "nothing"}; rename a field'
        )
    begin = text.find("{")
    if text[:begin].strip(" \t\r\n") not in ("", "["):
        return None
    try:
        first, _ = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):  # a document longer than the head, or no JSON
        first = {"text": None} if len(head) == HEAD and '"text":' in text.replace(" ", "") else {}
    if "text" not in first:
        return None
    return Kind.LINES if text.startswith("{") and len(lines) == 1 else Kind.VALUES


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
