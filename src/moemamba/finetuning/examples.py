"""What a model is to learn, from JSON lines: conversations, prompts with completions, texts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..host.files import FileError, check_regular, expanded, parse_json
from ..reading import shown
from .template import Piece, Template

LINE_LIMIT = 1 << 26
"""bytes of a line"""
ROLES = ("system", "user", "assistant", "tool")
EXPECTED = 'write a JSON object with "messages", "prompt" and "completion", or "text" in each line'


class Example(NamedTuple):
    """A sequence of tokens, of which some are to be learnt."""

    tokens: NDArray[np.int64]
    learnt: NDArray[np.bool_]
    """of each token, whether it is to be predicted"""
    held_out: bool


def read_examples(file: str, template: Template, answers_only: bool, held_out: float, context: int) -> list[Example]:
    """All examples of a file, cut to a context, with none left out in which nothing is to be learnt.

    Raises:
        ValueError: a line is no example, named by its number, or there is none.
        OSError: it cannot be read.
    """
    found = []
    for where, line, values in _lines(find_examples(file)):
        try:
            pieces = pieces_of(values, template, answers_only)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        tokens = np.concatenate([np.array(ids, np.int64) for ids, _ in pieces])[: context + 1]
        learnt = np.concatenate([np.full(len(ids), said) for ids, said in pieces])[: context + 1]
        if len(tokens) > 1 and learnt[1:].any():
            share = int.from_bytes(hashlib.sha256(line).digest()[:6], "big") / (1 << 48)
            found.append(Example(tokens, learnt, share < held_out))
    if not found:
        raise ValueError(f"{file} has nothing to learn in the first {context:,} tokens of any line; see --context")
    if all(example.held_out for example in found):
        raise ValueError(f"{file} has {len(found)} examples, all of them held out; lower --held-out")
    return found


def pieces_of(values: Any, template: Template, answers_only: bool) -> list[Piece]:
    """The tokens of one example; raises ValueError if it is none."""
    kinds = [kind for kind in ("messages", "prompt", "text") if isinstance(values, dict) and kind in values]
    if len(kinds) != 1:
        raise ValueError('expected one of "messages", "prompt" with "completion", and "text"')
    words = template.tokenizer
    if kinds == ["messages"]:
        pieces = template.pieces(_messages(values["messages"]))
    elif kinds == ["text"]:
        pieces = [([*words.encode(_text(values, "text")), words.end_of_text], True)]
    else:
        prompt, completion = _text(values, "prompt"), _text(values, "completion")
        whole, before = words.encode(prompt + completion), words.encode(prompt)
        begins = before == whole[: len(before)]  # otherwise a token spans both, and they are encoded one by one
        pieces = [
            (before, False),
            ([*(whole[len(before) :] if begins else words.encode(completion)), words.end_of_text], True),
        ]
    if not any(said for _, said in pieces):
        raise ValueError("the assistant says nothing in it")
    return pieces if answers_only else [(ids, True) for ids, _ in pieces]


def _messages(values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"messages is {shown(values)}; expected a list of them")
    for message in values:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(
                f'a message is {shown(message)}; expected "role" (one of {", ".join(ROLES)}) and "content"'
            )
        _text(message, "content")
    return values


def _text(values: dict[str, Any], name: str) -> str:
    text = values.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{name} is {shown(text)}; expected a text")
    return text


def find_examples(file: str) -> Path:
    """The file of examples; raises OSError if there is none."""
    path = expanded(file)
    if not path.exists():
        raise FileNotFoundError(f"there are no examples at {path}; name a file of JSON lines with data (--data)")
    check_regular(path)
    return path


def _lines(file: Path) -> Iterator[tuple[str, bytes, Any]]:
    """Where a line is, the line, and what it holds."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT):
            number += 1
            where = f"{file}, line {number:,}"
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise FileError(f"{where} is not UTF-8 text") from error
            if text:
                yield where, line.strip(), parse_json(text, where, EXPECTED)
