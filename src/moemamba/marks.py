"""What an option is, marked at its field: the one declaration that help, resuming and comparing derive theirs from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Change = Literal["never", "on a branch", "on resume", "always"]
_CHANGES = get_args(Change)


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


def marks(kind: type) -> dict[str, Marks]:
    """The marks of a dataclass's options by name, in the order of the fields."""
    return {each.name: found for each in dataclasses.fields(kind) if (found := each.metadata.get("marks"))}


def changeable(kind: type, where: Change) -> set[str]:
    """The options of which a run that goes on there may have other values."""
    least = _CHANGES.index(where)
    return {name for name, each in marks(kind).items() if _CHANGES.index(each.changes) >= least}
