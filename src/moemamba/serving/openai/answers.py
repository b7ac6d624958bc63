"""One choice of an answer: its text as it comes, up to a stop, and how likely the model found its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...inference import Event, Reading, Score
from ...text import StreamDecoder, Tokenizer, UntilText

LOWEST = -9999.0
"""stands for the logarithm of what is impossible, which JSON has no number for"""


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    offset: int
    """characters of the text before it"""
    score: Score | None


class Spelling:
    """Tokens as strings, each another: what is no whole character is spelled by its bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """`bytes:\\xe2` of a token that is half a character."""
        if token not in self._known:
            raw = self._tokenizer.spelling(token)
            try:
                self._known[token] = raw.decode()
            except UnicodeDecodeError:
                self._known[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self._known[token]

    def top(self, score: Score, token: int) -> dict[str, float]:
        """The most likely tokens and the chosen one, by their strings; the likelier of two that look alike."""
        found: dict[str, float] = {}
        for each, value in (*score.top, (token, score.logprob)):
            found.setdefault(self(each), max(value, LOWEST))
        return found


class Choice:
    """Follows one request.

    Args:
        before: last tokens of its prompt.
        start: characters that stand before the answer, where the prompt is echoed.

    Attributes:
        finish: "stop" or "length" once it has ended.
        failure: why it could not end in good order.
        ids: its tokens, up to what ended it.
        sampled: tokens that were chosen, a stop included.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str], endings: frozenset[int], start: int = 0
    ):
        self._decoder, self._until = StreamDecoder(tokenizer, before), UntilText(stops)
        self._endings, self._start = endings, start
        self._known = 0  # characters that tokens have spelled
        self._shown = 0  # characters that have been taken
        self._tokens: list[Token] = []
        self._taken = 0  # tokens of which has been told
        self._text = ""
        self.ids: list[int] = []
        self.finish: str | None = None
        self.failure: str | None = None
        self.reading: Reading | None = None
        self.sampled = 0

    @property
    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self.finish is not None or self.failure is not None

    def push(self, event: Event) -> None:
        """What a step made of it."""
        if event.reading is not None:
            self.reading = event.reading
        if event.failure is not None:
            self.failure = event.failure
            return
        token = event.ended_by if event.token is None else event.token
        if token is not None:
            self.sampled += 1
            self.ids.append(token)
            if not (event.token is None and token in self._endings):
                self._tokens.append(Token(token, self._start + self._known, event.score))
                self._spell(self._decoder.push(token))
        if event.kept is not None:
            self._end(event.kept)

    def take(self) -> tuple[str, list[Token]]:
        """Text and tokens since the last time."""
        text, self._text = self._text, ""
        self._shown += len(text)
        last = self._taken
        while last < len(self._tokens) and (
            self._tokens[last].offset - self._start < self._shown or (self.ended and last < len(self.ids))
        ):
            last += 1
        tokens, self._taken = self._tokens[self._taken : last], last
        return text, tokens

    def _spell(self, piece: str) -> None:
        self._known += len(piece)
        self._text += self._until.push(piece)

    def _end(self, kept: int) -> None:
        self._spell(self._decoder.finish())
        self._text += self._until.finish()
        self.finish = "stop" if kept < len(self.ids) else "length"
        del self.ids[kept:]


def logprobs(tokens: Sequence[Token], spelling: Spelling) -> dict[str, Any]:
    """OpenAI's object of a completion; a token without a score, which only the first can be, has null."""
    return {
        "tokens": [spelling(token.id) for token in tokens],
        "token_logprobs": [None if token.score is None else max(token.score.logprob, LOWEST) for token in tokens],
        "top_logprobs": [None if token.score is None else spelling.top(token.score, token.id) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def prompt_tokens(ids: Sequence[int], scores: Sequence[Score], tokenizer: Tokenizer) -> tuple[str, list[Token]]:
    """A prompt's text and its tokens with what they scored; the first has none unless something came before it."""
    own: list[Score | None] = [*([None] * (len(ids) - len(scores))), *scores]
    decoder, text, tokens = StreamDecoder(tokenizer), "", []
    for token, found in zip(ids, own, strict=True):
        tokens.append(Token(token, len(text), found))
        text += decoder.push(token)
    return text + decoder.finish(), tokens
