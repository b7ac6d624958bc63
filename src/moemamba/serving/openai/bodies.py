"""What clients send: JSON objects, read field by field."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

from ...inference import Sampling
from ...reading import from_dict, in_words, shown
from ..refusal import invalid

Body = TypeVar("Body")
STOPS = 16
"""texts that may end an answer"""
DIGITS = 100
"""of a whole number: none that means anything has more"""
TOP = 20
"""most likely tokens that may be asked for beside each"""


@dataclass(frozen=True)
class Asked:
    """What a completion and an answer in a conversation have in common."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: Any = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    user: Any = None
    response_format: dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_routed_experts: bool = False
    state: str | None = None
    return_state: bool = False

    def __post_init__(self) -> None:
        _within(self, "temperature", 0, 2)
        _within(self, "top_p", 0, 1)
        _within(self, "n", 1, 1024)
        _within(self, "presence_penalty", -2, 2)
        _within(self, "frequency_penalty", -2, 2)
        _within(self, "top_k", 0, 1 << 31)
        _within(self, "min_p", 0, 1)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen. A top_p of 0 is the most likely token, and a top_k of 0 or -1 all of them."""
        return Sampling(
            temperature=self.temperature if self.top_p > 0 else 0.0,
            top_k=self.top_k if (self.top_k or 0) > 0 and self.temperature else None,
            top_p=self.top_p if 0 < self.top_p < 1 and self.temperature else None,
            min_p=self.min_p if self.min_p and self.temperature else None,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if self.stop is None:
            return ()
        several = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
            raise invalid(f"stop is {shown(self.stop)}; it must be a text or a list of texts", "stop")
        if len(several) > STOPS or not all(several):
            raise invalid(f"stop must be at most {STOPS} texts, none of them empty", "stop")
        if any(len(each) > 1000 for each in several):
            raise invalid("stop has a text of more than 1,000 characters; give a shorter one", "stop")
        return tuple(several)

    def bias(self, vocabulary: int) -> dict[int, float]:
        """By token."""
        found = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdecimal() or len(key) > 10 or int(key) >= vocabulary:
                raise invalid(f"logit_bias has {key!r:.40}, which is no token of this model", "logit_bias")
            if not -100 <= value <= 100:
                raise invalid(f"logit_bias has {value} for {key}; it must be from -100 to 100", "logit_bias")
            found[int(key)] = value
        return found

    def endings(self, end_of_text: int, vocabulary: int) -> frozenset[int]:
        """Tokens that end an answer."""
        asked = self.stop_token_ids or []
        if any(not 0 <= each < vocabulary for each in asked):
            message = f"stop_token_ids has a token that there is not; this model's are 0 to {vocabulary - 1}"
            raise invalid(message, "stop_token_ids")
        return frozenset(asked if self.ignore_eos else [*asked, end_of_text])


@dataclass(frozen=True)
class Completion(Asked):
    """`POST /v1/completions`."""

    prompt: Any = None
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self, "max_tokens", 0, 1 << 31)
        _within(self, "logprobs", 0, TOP)
        if self.suffix:
            raise ValueError("suffix is not supported: this model continues a text and fills no gap; leave it out")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported; ask for n answers with logprobs and choose among them")


@dataclass(frozen=True)
class Chat(Asked):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "max_completion_tokens"):
            _within(self, name, 1, 1 << 31)
        _within(self, "top_logprobs", 0, TOP)
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; set both")
        if self.tools or self.functions:
            raise ValueError("tools are not supported: this model calls no functions; leave them out")


@dataclass(frozen=True)
class NewState:
    """`POST /v1/states`: what is read, and after which state."""

    prompt: Any = None
    tokens: list[int] | None = None
    from_: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Fork:
    """`POST /v1/states/{id}/fork`."""

    copies: int = 1

    def __post_init__(self) -> None:
        _within(self, "copies", 1, 1000)


@dataclass(frozen=True)
class Routed:
    """`POST /v1/routing`: which experts the tokens of a text visit."""

    prompt: Any = None
    state: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Tokenize:
    """`POST /tokenize`."""

    prompt: str
    add_special_tokens: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Detokenize:
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


def read_body(kind: type[Body], data: bytes) -> tuple[Body, list[str]]:
    """A body from what was sent, and the names of fields that it does not know.

    Raises:
        Refusal: it is no JSON object, or a field has a value that cannot be.
    """
    values = _object(data)
    names = _names(kind)  # type: ignore[arg-type]
    ignored = sorted(name for name in values if name not in names)
    known = {names[name]: value for name, value in values.items() if name in names and value is not None}
    try:
        return from_dict(kind, known, "request"), ignored
    except ValueError as error:
        message = str(error).removeprefix("request: ").removeprefix("request.")
        param = re.match(r"[a-z_]+\b", message)
        found = param[0].rstrip("_") if param and param[0] in names.values() else None
        raise invalid(message, found) from error


@cache
def _names(kind: Any) -> dict[str, str]:
    """Fields, by what clients call them."""
    return {each.name.rstrip("_"): each.name for each in fields(kind)}


def _object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_int=_number)
    except UnicodeDecodeError as error:
        raise invalid("the body is not UTF-8 text") from error
    except RecursionError as error:
        raise invalid("the body is nested too deeply") from error
    except ValueError as error:
        raise invalid(f"the body is not JSON ({error}); send a JSON object") from error
    if not isinstance(values, dict):
        raise invalid(f"the body is {in_words(type(values))}; send a JSON object")
    return values


def _number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _within(body: Any, name: str, least: float, most: float) -> None:
    value = getattr(body, name)
    if value is not None and not least <= value <= most:
        if name == "top_k" and value == -1:
            return
        raise ValueError(f"{name} is {value}; it must be from {least} to {most}")


def prompts_of(prompt: Any) -> Sequence[str | list[int]]:
    """The prompts of a request: a text, texts, tokens, or lists of tokens.

    Raises:
        Refusal: it is anything else.
    """
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return prompt
        if _are_tokens(prompt):
            return [prompt]
        if all(isinstance(each, list) and _are_tokens(each) for each in prompt):
            return prompt
    raise invalid("prompt must be a text, a list of texts, a list of tokens, or a list of such lists", "prompt")


def _are_tokens(values: list[Any]) -> bool:
    return all(type(each) is int for each in values)
