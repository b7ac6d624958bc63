"""`decode` for ids that come one by one: each kind of decoder as a step that holds back what is not settled yet.

The steps do what the decoders of the `tokenizers` library do, each holding back what later ids may change: a byte that
is half a character, a run of bytes that one more byte can make invalid, a last word. A decoder that is not known here
is asked at the end, with all ids.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any, Protocol

import tokenizers

from .foreign import described

_BYTE = re.compile("<0x([0-9A-Fa-f]{2}|[+][0-9A-Fa-f])>")


class Pieces(Protocol):
    """Text of ids that come one by one; all pieces together are the text of all ids."""

    def follow(self, ids: Iterable[int]) -> None:
        """Begin after a text of these ids, which is not returned: the first letters may depend on it."""

    def push(self, token: int) -> str:
        """The text that this token settles, perhaps none."""

    def finish(self) -> str:
        """What is left at the end."""


class Utf8:
    """Ids that are bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def follow(self, ids: Iterable[int]) -> None:
        for token in ids:
            self.push(token)

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes((token,))) if 0 <= token < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class Held:
    """Nothing until the end."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._ids = decode, list[int]()

    def follow(self, ids: Iterable[int]) -> None:
        """As if there were none: what all of them are is not known in parts."""

    def push(self, token: int) -> str:
        self._ids.append(token)
        return ""

    def finish(self) -> str:
        return self._decode(self._ids)


class Step:
    """A decoder: strings in, strings out. This one says of each string what it becomes, first or not.

    Args:
        decode: of a string.
        later: of a string that others came before, where that makes a difference.
    """

    def __init__(self, decode: Callable[[str], str], later: Callable[[str], str] | None = None):
        self._decode, self._later = decode, later or decode

    def push(self, text: str) -> list[str]:
        decode, self._decode = self._decode, self._later
        return [decode(text)]

    def settle(self) -> list[str]:
        """What is held back of a text that is whole, and ends here."""
        return []

    def finish(self) -> list[str]:
        return []


class ByteLevel(Step):
    """Each letter of a token stands for a byte; a token that has other letters, for its own text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, text: str) -> list[str]:
        return [self._decoder.decode(_raw(text))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


@lru_cache(1 << 16)
def _raw(token: str) -> bytes:
    known = byte_vocabulary()
    try:
        return bytes([known[letter] for letter in token])
    except KeyError:
        return token.encode()


class ByteFallback(Step):
    """Tokens such as <0x0A> stand for bytes. A run of them is text, or where it is not UTF-8, nothing but U+FFFD."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, text: str) -> list[str]:
        byte = _BYTE.fullmatch(text)
        if byte is None:
            return [*self.finish(), text]
        self._run.append(int(byte[1], 16))
        return []

    def settle(self) -> list[str]:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:  # half a character waits for the rest
            return []
        self._run.clear()
        return [text] if text else []

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class Words(Step):
    """A suffix ends words: a space, but at the end of the text. The last string waits for the next."""

    def __init__(self, decode: Callable[[list[str]], str]):
        self._all, self._last = decode, list[str]()

    def push(self, text: str) -> list[str]:
        before, self._last = self._last, [text]
        return [self._all([*before, ""])] if before else []

    def finish(self) -> list[str]:
        return [self._all(self._last)] if self._last else []


class StripStart(Step):
    """Takes some letters away where the text begins, which may be in several pieces."""

    def __init__(self, letter: str, count: int):
        self._letter, self._left = letter, count

    def push(self, text: str) -> list[str]:
        while self._left and text:
            if text[0] != self._letter:
                self._left = 0
                break
            text, self._left = text[1:], self._left - 1
        return [text]


class Trained:
    """The ids of a tokenizer of the library.

    Args:
        special: names of tokens that are not shown.
        steps: its decoder.
    """

    def __init__(self, inner: tokenizers.Tokenizer, special: set[str], steps: list[Step]):
        self._name, self._special, self._steps = inner.id_to_token, special, steps
        self._plain = len(steps) == 1 and isinstance(steps[0], ByteLevel)  # most are, and it is one string

    def follow(self, ids: Iterable[int]) -> None:
        if any(isinstance(step, Words) for step in self._steps):
            return  # what it holds back cannot be told from what is to come
        for token in ids:
            self.push(token)
        for place, step in enumerate(self._steps, 1):
            self._through(step.settle(), place)

    def push(self, token: int) -> str:
        name = self._name(token) if 0 <= token < 1 << 32 else None
        if name is None or name in self._special:
            return ""
        return self._steps[0].push(name)[0] if self._plain else self._through([name], 0)

    def finish(self) -> str:
        return "".join(self._through(step.finish(), place) for place, step in enumerate(self._steps, 1))

    def _through(self, texts: list[str], place: int) -> str:
        for step in self._steps[place:]:
            texts = step.push(texts[0]) if len(texts) == 1 else [out for text in texts for out in step.push(text)]
        return "".join(texts)


def pieces_of(decoder: Any) -> list[Step] | None:
    """The steps of a decoder of the library; None if one of them is not known here."""
    found = described(decoder)
    if found is None:
        return [Step(lambda text: text, lambda text: f" {text}")]
    parts = found["decoders"] if found["type"] == "Sequence" else [found]
    steps: list[Step] = []
    whole = False  # whether all that came before is one string for the next decoder
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            whole = True
            continue
        step = _after_fuse(part) if whole else _step(part)
        if step is None:
            return None
        whole = whole or kind == "ByteLevel"
        steps.append(step)
    return steps


def speller(decoder: Any) -> Callable[[str], bytes]:
    """What a decoder of the library makes of the name of a token that others stand before."""
    steps = pieces_of(decoder) or []
    if any(isinstance(step, ByteLevel) for step in steps):
        return _raw
    bytewise = any(isinstance(step, ByteFallback) for step in steps)

    def spell(name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if bytewise else None
        if byte is not None:
            return bytes((int(byte[1], 16),))
        if decoder is None:
            return f" {name}".encode()
        return str(decoder.decode(["x", name, "x"])).removeprefix("x").removesuffix("x").encode()

    return spell


def _after_fuse(part: dict[str, Any]) -> Step | None:
    """A decoder of one string, which comes in pieces."""
    if part["type"] == "Strip" and not part["stop"]:
        return StripStart(part["content"], part["start"])
    return None


def _step(part: dict[str, Any]) -> Step | None:
    """A decoder of the strings of tokens."""
    match part["type"]:
        case "ByteLevel":
            return ByteLevel()
        case "ByteFallback":
            return ByteFallback()
        case "BPEDecoder":
            return Words(_decoder(part).decode)
        case "Replace" | "Strip":
            alone = _decoder(part).decode
            return Step(lambda text: alone([text]))
        case "WordPiece" | "Metaspace":
            both = _decoder(part).decode
            return Step(lambda text: both([text]), lambda text: both(["", text]))
    return None


def _decoder(part: dict[str, Any]) -> Any:
    """A decoder of the library by itself."""
    plain: dict[str, Any] = {"version": "1.0", "added_tokens": [], "decoder": part}
    plain["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    return tokenizers.Tokenizer.from_str(json.dumps({**plain, **dict.fromkeys(parts)})).decoder


@cache
def byte_vocabulary() -> dict[str, int]:
    """Every byte by the printable letter that byte-level tokenizers spell it with."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(others)): byte for byte in range(256)}
