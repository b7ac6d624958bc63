"""Answers that keep to a form, JSON or a schema of it, by llguidance (extra `json`)."""

import asyncio
import json
from importlib import import_module
from typing import Any

import numpy as np

from ...text import Tokenizer
from ..refusal import invalid

LARGEST = 64 << 10
"""bytes of a schema"""
SECONDS = 10.0
"""that reading one may take"""


class Following:
    """One answer's place in a grammar: `inference.request.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int, end_of_text: int):
        self._matcher, self._vocabulary, self._end = matcher, vocabulary, end_of_text

    def allowed(self) -> Any:
        """(v,) bool: tokens that may come next; the end where the grammar knows no other way."""
        found = np.zeros(self._vocabulary, bool)
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
            found[: len(mask)] = mask
        if not found.any():
            found[self._end] = True
        return found

    def push(self, token: int) -> None:
        """The token that came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Reads what answers have to keep to, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: Any = None

    async def following(self, asked: dict[str, Any] | None, vocabulary: int, count: int) -> list[Following | None]:
        """One for each of `count` answers; None where there is nothing to keep to.

        Raises:
            Refusal: the form is not known, or the schema cannot be used.
        """
        kind = None if asked is None else asked.get("type")
        if asked is None or kind == "text":
            return [None] * count
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            given = asked.get("json_schema")
            schema = given.get("schema") if isinstance(given, dict) else None
            if not isinstance(schema, dict | bool):
                raise invalid("response_format.json_schema.schema must be a JSON schema", "response_format")
        elif kind != "json_object":
            raise invalid('response_format.type must be "text", "json_object" or "json_schema"', "response_format")
        text = json.dumps(schema)
        if len(text) > LARGEST:
            raise invalid(f"the schema has more than {LARGEST:,} bytes; use a smaller one", "response_format")
        try:
            async with asyncio.timeout(SECONDS):
                return list(await asyncio.to_thread(self._made, text, vocabulary, count))
        except TimeoutError:
            message = f"the schema takes longer than {SECONDS:g} seconds to read; use a simpler one"
            raise invalid(message, "response_format") from None

    def _made(self, schema: str, vocabulary: int, count: int) -> list[Following]:
        try:
            library = import_module("llguidance")
        except ImportError as error:
            message = 'response_format needs llguidance; start the server after pip install "moemamba[json]"'
            raise invalid(message, "response_format") from error
        if self._known is None:
            self._known = library.LLTokenizer(library.TokenizerWrapper(_Words(self._tokenizer)), n_vocab=vocabulary)
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        except Exception as error:
            raise invalid(f"the schema cannot be used ({_first(str(error))})", "response_format") from error
        matcher = library.LLMatcher(self._known, grammar, log_level=0)
        if matcher.is_error():
            raise invalid(f"the schema cannot be used ({_first(matcher.get_error())})", "response_format")
        end = self._tokenizer.end_of_text
        return [Following(matcher.deep_copy(), vocabulary, end) for _ in range(count)]


class _Words:
    """A tokenizer as llguidance looks at one."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = self.bos_token_id = tokenizer.end_of_text
        self.tokens = [tokenizer.spelling(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special.values())

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def _first(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:200]
