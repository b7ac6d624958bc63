"""Where a row ends: at a token, a sequence of tokens, or a text, which may begin and end within tokens."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from ..text import StreamDecoder, Tokenizer, UntilText

Stop = int | str | Sequence[int]


@dataclass(frozen=True)
class Stops:
    """What ends a row."""

    tokens: frozenset[int] = frozenset()
    sequences: tuple[list[int], ...] = ()
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    """of the texts"""


def read_stops(stop: Stop | Collection[Stop], vocab_size: int, tokenizer: Tokenizer | None = None) -> Stops:
    """Stops as they may be given: one, or several of any kind.

    Raises:
        ValueError: something that can never come, or a text without a tokenizer that reads it.
    """
    single = isinstance(stop, str) or not hasattr(stop, "__iter__") or getattr(stop, "ndim", 1) == 0
    tokens, sequences, texts = set[int](), list[list[int]](), list[str]()
    for one in [stop] if single else stop:  # type: ignore[union-attr]
        if isinstance(one, str):
            texts.append(one)
        elif hasattr(one, "__iter__") and getattr(one, "ndim", 1) > 0:
            sequences.append([_token(each, vocab_size) for each in one])
        else:
            tokens.add(_token(one, vocab_size))
    if not all((*sequences, *texts)):
        raise ValueError("an empty stop would end every row at once; leave it out")
    if texts and tokenizer is None:
        raise ValueError(f"stop has the text {texts[0]!r}; give tokenizer= as well, or the text's tokens")
    return Stops(frozenset(tokens), tuple(sequences), tuple(texts), tokenizer)


def _token(value: Any, vocab_size: int) -> int:
    try:
        token = index(value)
    except TypeError:
        raise ValueError(f"stop has {value!r}; expected tokens, sequences of tokens, or texts") from None
    if not 0 <= token < vocab_size:
        raise ValueError(f"stop has the token {token}; this model's tokens are 0 to {vocab_size - 1}")
    return token


class Ending:
    """Watches the tokens of one row.

    Args:
        before: last tokens of its prompt, which its text may depend on.

    Attributes:
        kept: once the row has ended, how many of its tokens come before what ended it; None until then.
        never: there is nothing that would end it.
    """

    def __init__(self, stops: Stops, before: Sequence[int] = ()):
        self._stops, self._count = stops, 0
        self.kept: int | None = None
        self._recent: list[int] = []
        self._longest = max(map(len, stops.sequences), default=0)
        self._text = _Text(stops.texts, stops.tokenizer, before) if stops.tokenizer and stops.texts else None
        self.never = not (stops.tokens or self._longest or self._text)

    def push(self, token: int) -> bool:
        """Whether the row ends with this token."""
        if self.never:
            return False
        self._count += 1
        if token in self._stops.tokens:
            self.kept = self._count - 1
        if self._longest:
            self._recent = [*self._recent[-self._longest + 1 :], token] if self._longest > 1 else [token]
            for sequence in self._stops.sequences:
                if self._recent[-len(sequence) :] == sequence:
                    self._end(self._count - len(sequence))
        if self._text is not None:
            self._end(self._text.push(token))
        return self.kept is not None

    def finish(self) -> None:
        """There are no more tokens."""
        if self._text is not None and self.kept is None:
            self._end(self._text.finish())

    def _end(self, kept: int | None) -> None:
        if kept is not None:
            self.kept = kept if self.kept is None else min(self.kept, kept)


class _Text:
    """Looks for texts in what tokens spell."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, before: Sequence[int]):
        self._decoder, self._until = StreamDecoder(tokenizer, before), UntilText(texts)
        self._starts: list[int] = []  # characters that were known before each token
        self._known = 0

    def push(self, token: int) -> int | None:
        """If a text has come, the tokens that come before it; one that has a part in it does not."""
        self._starts.append(self._known)
        return self._look(self._decoder.push(token))

    def finish(self) -> int | None:
        return self._look(self._decoder.finish())

    def _look(self, piece: str) -> int | None:
        self._known += len(piece)
        self._until.push(piece)
        if not self._until.found:
            return None
        start = self._starts[bisect_right(self._starts, self._until.shown) - 1]
        return bisect_left(self._starts, start)  # with tokens before that were no whole character yet
