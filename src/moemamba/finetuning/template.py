"""Conversations as tokens: a Jinja template, as models of the Hugging Face hub bring one, and who said what in it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..text import Tokenizer

PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""
"""for models that bring none"""

Piece = tuple[list[int], bool]
"""tokens, and whether they are what the assistant says"""


class Template:
    """Writes messages as a model is used to.

    What the template itself writes may be special tokens; what people wrote never is, even if it spells one.

    Args:
        source: of Jinja; it runs in a sandbox, without access to anything.
    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer
        added = json.loads(tokenizer.to_json())["added_tokens"]
        self._special = {token["content"]: int(token["id"]) for token in added if token["special"]}
        self._end = next(name for name, number in self._special.items() if number == tokenizer.end_of_text)
        self._hidden = {name: chr(0xF0000 + place) for place, name in enumerate(self._special)}  # for private use
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the template of conversations cannot be read ({error})") from error

    def pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """The tokens of a conversation in order; each answer of the assistant is a piece of its own.

        Raises:
            ValueError: the template refuses it, or writes what came before differently once there is an answer.
        """
        found: list[Piece] = []
        written = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._write(messages[:number], prompt=True)
            after = self._write(messages[: number + 1], prompt=False)
            if not (before.startswith(written) and after.startswith(before)):
                raise ValueError(
                    "the template writes what came before an answer differently after it, so that it cannot be told "
                    "what the model has to say; give another with --template"
                )
            answer, rest = self._answer(after[len(before) :])
            found += [(self._encode(before[len(written) :]), False), (self._encode(answer), True)]
            written = after[: len(after) - len(rest)]
        return [piece for piece in found if piece[0]]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens that an answer follows."""
        return self._encode(self._write(messages, prompt=True))

    def _answer(self, text: str) -> tuple[str, str]:
        """An answer to its end, and what separates it from the next message, which no model need say."""
        said = text.rstrip("\n")
        return (said, text[len(said) :]) if said.endswith(tuple(self._special)) else (text, "")

    def _write(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        shown = [{key: self._hide(value) for key, value in message.items()} for message in messages]
        try:
            text: str = self._template.render(
                messages=shown, add_generation_prompt=prompt, eos_token=self._end, bos_token=""
            )
        except TemplateError as error:
            raise ValueError(f"the template refuses the conversation: {error}") from error
        return text

    def _hide(self, value: Any) -> Any:
        """Names of special tokens in what people wrote, as characters that nobody writes."""
        if not isinstance(value, str):
            return value
        for name, letter in self._hidden.items():
            value = value.replace(name, letter)
        return value

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self._special)) + ")", text):
            if part in self._special:
                ids.append(self._special[part])
                continue
            for name, letter in self._hidden.items():
                part = part.replace(letter, name)
            ids += self.tokenizer.encode(part)
        return ids


def _refuse(message: str) -> None:
    raise TemplateError(message)
