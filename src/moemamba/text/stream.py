"""Text as it comes: pieces of whole characters, up to a stop."""

from collections.abc import Iterable, Sequence

from .foreign import refusal
from .tokenizer import Tokenizer


class StreamDecoder:
    """Text of tokens that arrive one by one, never half a character.

    For any ids, the pieces together are what `decode` makes of all of them.

    Args:
        before: ids that came before, whose text is not returned, but which what follows may depend on: a half character
            is completed, and a space between two words is one.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
        self._pieces = tokenizer.pieces()
        try:
            self._pieces.follow(before)
        except BaseException as error:
            if not isinstance(refusal(error, "decode the ids"), ValueError):
                raise
            self._pieces = tokenizer.pieces()  # what it cannot decode it does not depend on

    def push(self, token: int) -> str:
        """The text that this token settles, perhaps none.

        Raises:
            ValueError: the tokenizer cannot decode it.
        """
        try:
            return self._pieces.push(token)
        except BaseException as error:
            raise refusal(error, "decode the ids") from error

    def finish(self) -> str:
        """What is left at the end; raises what `push` raises."""
        try:
            return self._pieces.finish()
        except BaseException as error:
            raise refusal(error, "decode the ids") from error


class UntilText:
    """Text that comes in pieces, up to the first of some texts to be complete, wherever the pieces are cut.

    What may begin one of them waits for the next piece.

    Attributes:
        found: one of them has come; nothing is shown any more.
        shown: characters so far.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts, self._held = texts, ""
        self.found, self.shown = False, 0

    def push(self, piece: str) -> str:
        """What can be shown now."""
        if self.found:
            return ""
        held = self._held + piece
        ends = [(place + len(text), place) for text in self._texts if (place := held.find(text)) >= 0]
        self.found = bool(ends)
        return self._show(held, min(ends)[1] if ends else len(held) - self._waiting(held))

    def finish(self) -> str:
        """What is left at the end."""
        return self._show("" if self.found else self._held, len(self._held))

    def _waiting(self, held: str) -> int:
        """Characters at the end that may begin one of the texts."""
        longest = max(map(len, self._texts), default=1)
        sizes = range(min(longest - 1, len(held)), 0, -1)
        return next((size for size in sizes if any(text.startswith(held[-size:]) for text in self._texts)), 0)

    def _show(self, text: str, size: int) -> str:
        self._held = text[size:]
        self.shown += len(text[:size])
        return text[:size]
