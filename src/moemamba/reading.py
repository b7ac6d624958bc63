"""Dataclasses from plain values, checked field by field; to plain values and back. No torch here."""

import dataclasses
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from .host.files import read_json

LARGEST = 1e300  # of a number that a field can hold; infinity and what is not a number are none

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}

Config = TypeVar("Config")
_KNOWN: dict[Any, dict[str, Any]] = {}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON; what `marks.later` marks is left out where it is the default."""
    return _written(config, dataclasses.asdict(config))


def from_dict(kind: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """A configuration dataclass from plain values, nested ones included.

    Raises:
        ValueError: an unknown key, a value of the wrong type or one that cannot work, named with its place.
    """
    if own := getattr(kind, "without_foreign", None):
        values = own(values, where)
    hints = _hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where} has the unknown key {shown(unknown[0])}; known keys are {', '.join(hints)}")
    loose = _loose(kind)  # type: ignore[arg-type]
    fields = {
        name: value if name in loose and isinstance(value, float) else _convert(hints[name], value, f"{where}.{name}")
        for name, value in values.items()
    }
    try:
        return kind(**fields)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{where} is incomplete: {str(error).partition(') ')[2] or error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_config(kind: type[Config], file: Path) -> Config:
    """A configuration dataclass from a JSON file.

    Raises:
        ValueError: what is wrong, with the file's name.
        OSError: it is missing or cannot be read.
    """
    return from_dict(kind, read_json(file), str(file))


def _written(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _written(value, values[field.name])
        elif field.metadata.get("later") and value == field.default:
            del values[field.name]
    return values


def in_words(kind: Any) -> str:
    """What a value of a type is, for people who write JSON or options."""
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}; expected the fields of {hint.__name__}")
        return from_dict(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in args if kind is not type(None)]
        if value is None and len(kinds) < len(args):
            return None
        several = isinstance(value, list | tuple)
        return _convert(next((k for k in kinds if several == (typing.get_origin(k) is tuple)), kinds[0]), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, f"{where}[{k}]") for k, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _convert(args[0], k, where): _convert(args[1], item, f"{where}.{_name(k)}") for k, item in value.items()
        }
    if hint is Any or (origin is Literal and value in args):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < LARGEST:
            raise ValueError(f"{where} is {value}; expected a finite number")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and not abs(value) < 1 << 63:
        raise ValueError(f"{where} is {value}; expected a number below 2^63")
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    expected = f"one of {', '.join(map(repr, args))}" if origin is Literal else in_words(origin or hint)
    raise ValueError(f"{where} is {shown(value)}; expected {expected}")


def validate(config: Any, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Every field has its declared type, and numbers the right sign, each where there are several; a list becomes the
    tuple that is declared, and a dictionary the dataclass. Raises ValueError otherwise."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        converted = _convert(hint, value, name)
        if type(value) is not type(converted) and isinstance(value, list | dict):
            object.__setattr__(config, name, converted)
    for name in positive + not_negative:
        given = getattr(config, name)
        if given == ():
            raise ValueError(f"{name} is empty; give one number or more")
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not (value > 0 or (value == 0 and name in not_negative)):
                bound = "greater than 0" if name in positive else "0 or more"
                raise ValueError(f"{name} is {shown(given)}; it must be {bound}")


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, which take longer to find than to check."""
    if kind not in _KNOWN:
        hints = typing.get_type_hints(kind)  # of class variables too
        _KNOWN[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return _KNOWN[kind]


@cache
def _loose(kind: Any) -> frozenset[str]:
    """Fields that hold any number, infinity too."""
    return frozenset(field.name for field in dataclasses.fields(kind) if field.metadata.get("finite") is False)


def amount(text: str, what: str) -> float:
    """`0.93M` -> 930000.0; raises ValueError, naming what it is of, where that is no number above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMBT]?)", text)
    if not found or not float(found[1]):
        raise ValueError(f"{what} is {text!r}; expected a number above 0, such as 930000 or 0.93M")
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(key: str) -> str:
    """A key for a message, quoted and cut where it is not what a field is called."""
    return key if key.isprintable() and len(key) < 80 else shown(key)
