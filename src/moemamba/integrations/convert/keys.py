"""The configuration of another program, read key by key: each has its type, and what we cannot compute is refused."""

from pathlib import Path
from typing import Any, TypeVar

from ...reading import in_words, shown

Value = TypeVar("Value", int, float, bool, str)


class Keys:
    """A config.json of another program.

    Args:
        values: its JSON object.
        where: its name, for messages.
    """

    def __init__(self, values: dict[str, Any], where: Path | str):
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, kind: type[Value], default: Value | None = None) -> Value:
        """A value of a type; `default` where the key is missing or null.

        Raises:
            ValueError: it is of another type, or missing without a default.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.where}: {name} is {shown(value)}; expected {in_words(kind)}")
        return value  # type: ignore[return-value]

    def must(self, name: str, expected: Any, default: Any, why: str) -> None:
        """Refuse a key with another value than the one that our layers compute; raises ValueError."""
        value = self.values.get(name, default)
        if value != expected:
            raise ValueError(f"{self.where}: {name} is {shown(value)}, and {why}")
