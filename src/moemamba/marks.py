"""What an option is, marked at its field: the one declaration that help, resuming and comparing derive theirs from.

What it means is said by the string below its field, once: for `--help`, for Python's `help()` and for editors.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_args

Change = Literal["never", "on a branch", "on resume", "always"]
_CHANGES = get_args(Change)
Kind = TypeVar("Kind", bound=type)


@dataclass(frozen=True)
class Marks:
    """How an option is classified."""

    group: str
    """its title in --help; the first group is the page of what most runs set"""
    place: int
    """in its group: lower ones come first, those of one place in the order of the fields"""
    changes: Change
    """where a run that goes on may have another value; each includes those before it. "on resume" are data (whose
    content is checked), evaluation and processes; what may change "always" enters no number that a run computes, so
    that a comparison goes on with another value too"""
    recipe: bool
    """models of a comparison may differ in it"""
    of_one_run: bool
    """a comparison sets it for each of its runs"""
    shows: tuple[str, ...]
    """of an option that has parts: those that stand in the group"""


def option(
    default: Any = dataclasses.MISSING,
    group: str = "",
    *,
    place: int = 0,
    changes: Change = "never",
    recipe: bool = False,
    of_one_run: bool = False,
    shows: tuple[str, ...] = (),
    factory: Any = dataclasses.MISSING,
    later: bool = False,
) -> Any:
    """A dataclass field with its marks; `later` as the function of that name has it."""
    marks = Marks(group, place, changes, recipe, of_one_run, shows)
    return field(default=default, default_factory=factory, metadata={"marks": marks, "later": later})  # type: ignore[call-overload]


def later(default: Any) -> Any:
    """A field that files of older versions lack: written only where it is not the default.

    So what has no use for it is written as ever, byte for byte, and older versions read it.
    """
    return field(default=default, metadata={"later": True})


def free(default: Any) -> Any:
    """A model's field that neither its weights nor the function it computes depend on: fine-tuning may change it."""
    return field(default=default, metadata={"free": True})


def marks(kind: type) -> dict[str, Marks]:
    """The marks of a dataclass's options by name, in the order of the fields."""
    return {each.name: found for each in dataclasses.fields(kind) if (found := each.metadata.get("marks"))}


def changeable(kind: type, where: Change) -> set[str]:
    """The options of which a run that goes on there may have other values."""
    least = _CHANGES.index(where)
    return {name for name, each in marks(kind).items() if _CHANGES.index(each.changes) >= least}


def documented(kind: Kind) -> Kind:
    """Let `help()` show what the strings below a dataclass's fields say. They are read when they are asked for."""
    kind.__doc__ = _Documentation(kind.__doc__ or "")  # type: ignore[assignment]
    return kind


class _Documentation:
    def __init__(self, text: str):
        self.text = inspect.cleandoc(text)

    def __get__(self, _: object, kind: type) -> str:
        about, lines = texts(kind), []
        for each in dataclasses.fields(kind):
            if text := about.get(each.name):
                lines += textwrap.wrap(f"{each.name}: {text}", 100, subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join([self.text, "", "Args:", *(f"    {line}" for line in lines)]) if lines else self.text


@cache
def texts(owner: type) -> dict[str, str]:
    """What the string below each field of a class says."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    except OSError:  # installed without sources
        return {}
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner.__name__:
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[field.target.id] = " ".join(str(text.value.value).split())
    return found
