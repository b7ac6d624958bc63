"""One pass over a held-out text, or over every other of its windows, and the bytes of what is predicted in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..text import ByteTokenizer
from .batches import Batch, Tokens, _batch, require_window

BEFORE = 16  # tokens that are decoded before a part of a text
LOST = 0.01  # share of a text that its tokens may lose and still have bits per byte


class HeldOut(NamedTuple):
    """A text that a model is evaluated on."""

    name: str
    share: float
    """of the evaluation"""
    tokens: Tokens
    half: int | None = None
    """which of its windows: 0 the first of every two, 1 the second, None all"""


def sequential(
    tokens: Tokens,
    batch_size: int,
    context: int,
    most: int | None = None,
    reset_state: bool = False,
    half: int | None = None,
) -> Iterator[Batch]:
    """One pass in the text's own order: every window once, the last batch perhaps smaller; see `windows`."""
    starts, tail = windows(tokens, context, most, half)
    for first in range(0, len(starts), batch_size):
        yield _batch(tokens, starts[first : first + batch_size], context, reset_state)
    if tail:
        yield _batch(tokens, np.array([len(tokens.ids) - 1 - tail]), tail, reset_state)


def windows(
    tokens: Tokens, context: int, most: int | None = None, half: int | None = None
) -> tuple[NDArray[np.int64], int]:
    """Where the windows of one pass begin, and the length of a shorter one after them, to the end of the text.

    The tokens that follow those of the windows are predicted: all of the text but its first, or one of two halves that
    have no predicted token in common.

    Args:
        most: read about that many tokens only, at least one window; the windows are spread evenly over the text, since
            its beginning need not be like the rest.
        half: see `HeldOut`.
    Raises:
        ValueError: the tokens do not fill one window, or of a second half two.
    """
    require_window("the validation data", tokens, context * (1 + (half or 0)))
    full, tail = divmod(len(tokens.ids) - 1, context)
    own = np.arange(full)
    if half is not None:
        own, tail = own[half::2], tail if full % 2 == half else 0
    if most is None or most >= len(own) * context + tail:
        return own * context, tail
    count = min(len(own), max(1, most // context))
    return own[np.arange(count) * len(own) // count] * context, 0


def splits(tokens: Tokens, context: int) -> bool:
    """Whether a text has windows enough for two halves."""
    return len(tokens.ids) > 2 * context


def predicted_bytes(tokens: Tokens, context: int, most: int | None = None, half: int | None = None) -> float:
    """The bytes of the text of the tokens that `sequential` predicts.

    Those of a part are what its tokens decode to, with some tokens before them, since a character can have several.
    """
    starts, tail = windows(tokens, context, most, half)
    if len(starts) * context + tail == len(tokens.ids) - 1:
        return tokens.bytes - _spelled(tokens, np.array([-1]), 1)
    last = _spelled(tokens, np.array([len(tokens.ids) - 1 - tail]), tail) if tail else 0.0
    return _spelled(tokens, starts, context) + last


def _spelled(tokens: Tokens, starts: NDArray[np.int64], size: int) -> float:
    """Bytes of the `size` tokens that follow each of the places."""
    if tokens.tokenizer is None:
        return tokens.bytes * len(starts) * size / len(tokens.ids)
    ids = tokens.ids
    if isinstance(tokens.tokenizer, ByteTokenizer):
        return float(sum((ids[start + 1 : start + 1 + size] < 256).sum() for start in starts))
    begins = [max(0, start + 1 - BEFORE) for start in starts]
    texts = tokens.tokenizer.decode_batch([ids[b : s + 1 + size] for b, s in zip(begins, starts, strict=True)])
    known = tokens.tokenizer.decode_batch([ids[b : s + 1] for b, s in zip(begins, starts, strict=True)])
    return (_size(texts) - _size(known)) / tokens.spelled


def _size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)
