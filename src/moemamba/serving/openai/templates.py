"""How a conversation becomes a prompt: a model's own template, in Jinja's sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ...host.files import read_json, read_text
from ...text import Tokenizer
from ..refusal import Refusal, invalid

LARGEST = 256 << 10
"""bytes of a template"""
LONGEST = 4 << 20
"""characters of what it makes"""
NONE = "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE"


class Template:
    """A template that makes one text of messages.

    Raises:
        ValueError: Jinja cannot read it, or is not installed.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str] | None = None):
        try:
            sandbox, meta = import_module("jinja2.sandbox"), import_module("jinja2")
        except ImportError as error:
            raise ValueError('chat templates need jinja2; pip install "moemamba[serve]"') from error
        self.source, self._errors = source, meta.TemplateError
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse}
        try:
            self._template = environment.from_string(source)
        except meta.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        end = tokenizer.spelling(tokenizer.end_of_text).decode(errors="replace")
        self._names = {"eos_token": end, "bos_token": end, **(names or {})}
        self._tokenizer = tokenizer
        special = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            Refusal: a message that the template does not take, or that has the name of a special token in it.
        """
        plain = [_plain(message) for message in messages]
        for message in plain:
            if found := self._special.search("\0".join(message.values())):
                name = found[0]
                raise invalid(f"a message has {name!r} in it, which would end or begin one; leave it out", "messages")
        try:
            text = str(self._template.render(messages=plain, add_generation_prompt=True, **self._names))
        except Refusal:
            raise
        except Exception as error:
            words = (str(error).splitlines() or [type(error).__name__])[0]
            raise invalid(f"the chat template does not take these messages ({words[:200]})", "messages") from error
        if len(text) > LONGEST:
            raise invalid("the conversation is too long", "messages", "context_length_exceeded")
        return self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = []
        last = 0
        for found in self._special.finditer(text):
            ids += [*self._tokenizer.encode(text[last : found.start()]), self._tokenizer.special[found[0]]]
            last = found.end()
        return ids + self._tokenizer.encode(text[last:])


def find_template(folder: Path, file: str | None, tokenizer: Tokenizer) -> Template | None:
    """The template in a file, or that which lies beside a model; None if there is none.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    if file is not None:
        return Template(read_text(Path(file), LARGEST), tokenizer)
    names: dict[str, str] = {}
    source = None
    if (folder / "tokenizer_config.json").exists():
        values = read_json(folder / "tokenizer_config.json", LARGEST)
        source = values.get("chat_template")
        names = {key: value for key, value in values.items() if key.endswith("_token") and isinstance(value, str)}
    if (folder / "chat_template.jinja").exists():
        source = read_text(folder / "chat_template.jinja", LARGEST)
    return Template(source, tokenizer, names) if isinstance(source, str) else None


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """A message as role and text; content may come in parts of text."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise invalid("each message needs a role and a content that is text", "messages")
    return {"role": role, "content": content}


def _refuse(message: object) -> NoReturn:
    raise invalid(f"the chat template does not take these messages ({str(message)[:200]})", "messages")
