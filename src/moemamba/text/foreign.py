"""What a tokenizer made elsewhere may ask for, and what is not done: its settings that act on the ids of a text, and
rules that make a text so long that memory runs out."""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

LARGEST_VOCABULARY = 1 << 21
"""tokens that a vocabulary can have: more than any published one, and an embedding that a machine can still hold"""
GROWTH = 64
"""how many times longer the rules of a tokenizer may make a text"""


def refusal(error: BaseException, doing: str) -> BaseException:
    """What to raise for an error of the library: a ValueError, unless the error is not about the text.

    The library raises bare Exception, and, where it panics, a BaseException that `except Exception` does not see.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        return error
    if isinstance(error, UnicodeEncodeError) or "TextInputSequence" in str(error):
        return ValueError(
            f"cannot {doing}: it holds half a character (a lone surrogate); remove it, or give UTF-8 text"
        )
    if isinstance(error, ValueError):
        return error
    return ValueError(f"the tokenizer cannot {doing} ({str(error)[:200]}); use another tokenizer, or mend its file")


def check_ids(vocabulary: Any, added: Any = ()) -> None:
    """Raises ValueError for an id that no embedding has room for.

    Before the library sees them, since it makes room for all below the largest. What is no id is left to the library.

    Args:
        vocabulary: {token: id} of a model, if it has one.
        added: the `added_tokens` of a tokenizer.json.
    """
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    ids += [(one.get("content"), one.get("id")) for one in added or () if isinstance(one, dict)]
    for name, number in ids:
        if isinstance(number, int) and number >= LARGEST_VOCABULARY:
            raise ValueError(
                f"the token {str(name)[:40]!r} has the id {number:,}, and a model has room for ids below "
                f"{LARGEST_VOCABULARY:,}; number the tokens from 0"
            )


def obey_nothing(inner: tokenizers.Tokenizer) -> None:
    """Switch off what makes more or less of a text than its ids.

    Raises:
        ValueError: what cannot be switched off.
    """
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # text that spells a special token must not become one
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    for part in _parts(described(inner.post_processor)):
        if sum("Sequence" in piece for piece in part.get("single", [])) > 1:
            raise ValueError("the tokenizer's post-processor repeats the text; remove it from the file")


def described(component: Any) -> dict[str, Any] | None:
    """A component of a tokenizer as its file has it."""
    if component is None:
        return None
    found: dict[str, Any] = json.loads(component.__getstate__())
    return found


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component, and those that it is a sequence of, in order."""
    if component is not None:
        yield component
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for part in component.get(key, []):
                yield from _parts(part)


def check_growth(inner: tokenizers.Tokenizer) -> None:
    """Raises ValueError where a normaliser or a decoder could make a text more than `GROWTH` times as long."""
    for name, component in (("normalizer", inner.normalizer), ("decoder", inner.decoder)):
        growth = _growth(described(component))
        if growth > GROWTH:
            raise ValueError(
                f"the tokenizer's {name} can make a text {growth:,.0f} times as long, which memory has no room for; "
                f"{GROWTH} times is the most"
            )


def _growth(component: dict[str, Any] | None) -> float:
    """How many times longer replacements can make a text, at most. Those that meet what others wrote multiply."""
    growth, written = 1.0, ""
    for part in _parts(component):
        content = part.get("content") if part["type"] == "Replace" else part.get("prepend")
        if not isinstance(content, str):
            continue
        pattern = part.get("pattern", {}).get("String")
        own = len(content) / len(pattern) if pattern else len(content) + 1.0  # an expression may match nothing at all
        if own > 1:
            growth = growth * own if not pattern or pattern in written else max(growth, own)
        written += content * 2
        if growth > 1e12 or len(written) > 1 << 20:
            return growth if growth > GROWTH else GROWTH + 1.0
    return growth
