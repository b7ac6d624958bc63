"""Arguments into the dataclass of a command: every field is an option, `--model.d-model` for one of a part.

A field's type says what its option takes; marks say the rest: `Positional[str]` stands without a name, `Place` is a
path, in which `~` is the home folder, `Merged` parts have no prefix, `Shared` ones besides lack the options of one run
alone, and `Repeated` ones take one value each time they are given.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from ..host.files import expanded
from ..marks import marks as marked
from ..marks import texts

Type = TypeVar("Type")
Arguments = TypeVar("Arguments")

Positional = Annotated[Type, "positional"]
Merged = Annotated[Type, "merged"]
Shared = Annotated[Type, "merged", "shared"]
Repeated = Annotated[Type, "repeated"]
Place = Annotated[str, "place"]

KINDS = {int: "a whole number, such as 1000", float: "a number, such as 0.5"}
SHOWN = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Option:
    """An option of a command."""

    path: tuple[str, ...]
    """names of fields, from the command's dataclass down"""
    name: str
    """as it is written: `--model.d-model`; of a positional one as help has it: `RUN`"""
    hint: Any
    owner: type
    """the dataclass that has the field"""
    default: Any
    """`dataclasses.MISSING` if it must be given"""
    positional: bool
    repeated: bool = False
    """whether it takes one value each time it is given"""
    group: str = ""
    """in help"""
    place: int = 0
    """in the group"""

    @property
    def flag(self) -> bool:
        return self.hint is bool

    @property
    def several(self) -> bool:
        """Whether it takes more than one value."""
        return any(typing.get_origin(each) in (tuple, dict) for each in self.alternatives)

    @property
    def table(self) -> bool:
        """Whether it takes values with names."""
        return typing.get_origin(self.hint) is dict

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that a value can have, without None."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return tuple(each for each in typing.get_args(self.hint) if each is not type(None)) if union else (self.hint,)

    @property
    def off(self) -> str:
        """What turns a flag off: `--model.no-final-norm`."""
        start, dot, last = self.name.removeprefix("--").rpartition(".")
        return f"--{start}{dot}no-{last}"

    @property
    def takes(self) -> str:
        """What help shows behind the name."""
        if self.flag or self.positional:
            return ""
        (kind, marks) = _plain(self._item)
        if typing.get_origin(kind) is Literal:
            shown = "|".join(map(str, typing.get_args(kind)))
        else:
            shown = "PATH" if "place" in marks else SHOWN.get(kind, "VALUE")
        shown = f"NAME={shown}" if self.table else shown
        return f" {shown}{' ...' if self.several and not self.repeated else ''}"

    @property
    def _item(self) -> Any:
        """The type of a value, of several each."""
        if self.table:
            return typing.get_args(self.hint)[1]
        tuples = [each for each in self.alternatives if typing.get_origin(each) is tuple]
        return typing.get_args(tuples[0])[0] if tuples else self.alternatives[0]

    def value(self, texts: Sequence[str]) -> Any:
        """From what was given; raises ValueError."""
        optional = type(None) in typing.get_args(self.hint)
        if optional and list(texts) == ["None"]:
            return None
        if self.table:
            return dict(self._entry(text) for text in texts)
        values = tuple(_converted(self._item, text, self.name) for text in texts)
        single = not self.several or (len(values) == 1 and len(self.alternatives) > 1)  # `str | tuple[str, ...]`
        return values[0] if single else values

    def _entry(self, text: str) -> tuple[str, Any]:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"{self.name} has {text!r}; write NAME=VALUE")
        return name, _converted(self._item, value, self.name)


def _plain(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """A type without its marks, and these."""
    if typing.get_origin(hint) is Annotated:
        kind, *marks = typing.get_args(hint)
        return kind, tuple(marks)
    return hint, ()


def _converted(hint: Any, text: str, name: str) -> Any:
    kind, marks = _plain(hint)
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if str(choice) == text:
                return choice
        choices = [str(choice) for choice in typing.get_args(kind)]
        raise ValueError(f"{name} is {text!r}; choose {'one of ' * (len(choices) > 1)}{', '.join(choices)}")
    if kind in KINDS:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}; expected {KINDS[kind]}") from None
    if "place" in marks and not text.strip():  # an unset variable of a shell; as a path it would be this folder
        raise ValueError(f"{name} is {text!r}, which names nothing; name a path, or . for the current folder")
    return str(expanded(text)) if "place" in marks and text.startswith("~") else text


def options(
    kind: type, default: Any = None, path: tuple[str, ...] = (), prefix: str = "", shared: bool = False
) -> Iterator[Option]:
    """Every option of a command's dataclass, in the order of its fields.

    Args:
        default: an instance that has the defaults; those of the fields themselves if None.
        shared: without those that a comparison sets for each of its runs.
    """
    hints, classified = typing.get_type_hints(kind, include_extras=True), marked(kind)
    for field in dataclasses.fields(kind):
        hint, marks = _plain(hints[field.name])
        mark = classified.get(field.name)
        if shared and mark and mark.of_one_run:
            continue
        here = (*path, field.name)
        value = _default(field) if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            start = prefix if "merged" in marks else f"{prefix}{field.name.replace('_', '-')}."
            for inner in options(typing.cast(type, hint), value, here, start, "shared" in marks):
                first = mark is not None and ".".join(inner.path[len(here) :]) in mark.shows
                yield dataclasses.replace(inner, group=mark.group, place=mark.place) if mark and first else inner
            continue
        positional = "positional" in marks
        name = field.name.upper() if positional else f"--{prefix}{field.name.replace('_', '-')}"
        if "place" in marks:
            hint = Annotated[hint, "place"]
        group, place = (mark.group, mark.place) if mark else ("", 0)
        yield Option(here, name, hint, _owner(kind, field.name), value, positional, "repeated" in marks, group, place)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _owner(kind: type, name: str) -> type:
    """The class that declares a field."""
    return next(each for each in kind.__mro__ if name in inspect.get_annotations(each))


def read(kind: type[Arguments], arguments: Sequence[str], command: str, default: Arguments | None) -> Arguments:
    """The dataclass of a command.

    Raises:
        ValueError: an argument that does not fit, in the words of the command line.
    """
    known = list(options(kind, default))
    changes: dict[tuple[str, ...], Any] = {}
    free: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not _names_option(word):
            free.append(word)
            continue
        name, equals, given = word.partition("=")
        option, on = _find(name, known, command)
        if option.flag and not equals:
            changes[option.path] = on
        elif option.flag:
            raise ValueError(f"{name} takes no value; write {option.name}, or {option.off}")
        else:
            value = option.value([given] if equals else _values(option, words))
            changes[option.path] = (*changes.get(option.path, ()), *value) if option.repeated else value
    _place(free, [option for option in known if option.positional], changes, command)
    built: Arguments = _built(kind, default, changes)
    return built


def _names_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not re.match(r"-\.?\d|-(inf|nan)\b", word)


def _find(name: str, known: Sequence[Option], command: str) -> tuple[Option, bool]:
    """The option of a name, and whether the name turns it on."""
    names = {option.name: (option, True) for option in known if not option.positional}
    names |= {option.off: (option, False) for option in known if option.flag}
    wanted = name.replace("_", "-")
    if wanted in names:
        return names[wanted]
    last = wanted.lstrip("-").rpartition(".")[2]
    near = [each for each in names if each.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(wanted, names, 1, 0.6)
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"moemamba {command} --help lists the options"
    raise ValueError(f"there is no option {name}; {hint}")


def _values(option: Option, words: list[str]) -> list[str]:
    """Take an option's values from the words that follow it."""
    taken: list[str] = []
    while words and not _names_option(words[0]) and ((option.several and not option.repeated) or not taken):
        taken.append(words.pop(0))
    if not taken:
        kind = KINDS.get(_plain(option.alternatives[0])[0], option.takes.strip())
        more = f" (write {option.name}={words[0]} if it is {words[0]!r})" if words else ""
        raise ValueError(f"{option.name} needs a value: {kind}{more}")
    return taken


def _place(free: list[str], known: Sequence[Option], changes: dict[tuple[str, ...], Any], command: str) -> None:
    """Give words without a name to the positional options."""
    for option in known:
        taken, free = (free, []) if option.several else (free[:1], free[1:])
        if taken:
            changes[option.path] = option.value(taken)
        elif option.default is dataclasses.MISSING and not option.several:
            about = texts(option.owner).get(option.path[-1], "").partition(";")[0]
            raise ValueError(f"{option.name} is missing: {about}; see moemamba {command.split()[0]} --help")
        elif option.default is dataclasses.MISSING:
            changes[option.path] = ()
    if free:
        raise ValueError(f"{free[0]!r} belongs to no option; moemamba {command.split()[0]} --help lists them")


def _built(kind: type, default: Any, changes: dict[tuple[str, ...], Any]) -> Any:
    """The dataclass with some fields changed, from the innermost part outwards."""
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        field = next(field for field in dataclasses.fields(kind) if field.name == name)
        part = _default(field) if default is None else getattr(default, name)
        inner = {path[1:]: value for path, value in changes.items() if len(path) > 1 and path[0] == name}
        own[name] = _built(type(part), part, inner)
    return kind(**own) if default is None else dataclasses.replace(default, **own)
