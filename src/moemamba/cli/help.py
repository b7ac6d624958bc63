"""What `moemamba COMMAND --help` prints, from the dataclass of the command: first what most people set."""

import ast
import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache

from .options import Option, options

FEW = 24  # options that one page shows at once
COLUMN = 28  # where the texts begin

Groups = Mapping[str, Sequence[str]]
"""options by the title of their group, in order; the first group is the first page"""


def page(kind: type, command: str, default: object = None, groups: Groups | None = None, every: bool = False) -> str:
    """The help of a command.

    Args:
        default: an instance that has the defaults.
        groups: names of options; those of the command's own dataclass come first, those of parts last.
        every: all options, not only those that are set most often.
    """
    known = list(options(kind, default))
    named = [option for option in known if not option.positional]
    free = [option for option in known if option.positional]
    parts = _grouped(kind, named, groups or {})
    hidden = 0
    if len(named) > FEW and not every:
        hidden = len(named) - len(parts[0][1])
        parts = parts[:1]
    usage = " ".join(f"[{each.name} ...]" if each.several else each.name for each in free)
    command = command if command.split()[1:] else f"{command} {usage}".strip()
    blocks = [f"usage: moemamba {command} [options]", _wrapped(inspect.cleandoc(kind.__doc__ or ""), "")]
    blocks += ["\n".join(_entry(option) for option in free)] if free else []
    for title, members in parts:
        entries = "\n".join(_entry(option) for option in members)
        blocks.append(f"{title}:\n{entries}" if title else entries)
    if hidden:
        blocks.append(f"{hidden} more options: moemamba {command.split()[0]} --help-all")
    return "\n\n".join(blocks)


def _grouped(kind: type, known: Sequence[Option], groups: Groups) -> list[tuple[str, list[Option]]]:
    """Options under titles: each at its first place, parts of the model under what the part is."""
    left = {option.name.removeprefix("--"): option for option in known}
    found: list[tuple[str, list[Option]]] = []
    for number, (title, names) in enumerate(groups.items()):
        own = [name for name, option in left.items() if option.owner is kind] if number == 0 else []
        own = [name for name in own if name not in names]
        members = [left.pop(name) for name in (*own, *names) if name in left]
        found.append((title, members))
    rest: dict[str, list[Option]] = {}
    for option in left.values():
        part = option.name.removeprefix("--").rpartition(".")[0]
        about = (option.owner.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        rest.setdefault(f"{part}: {about}" if part else "", []).append(option)
    return found + list(rest.items())


def _entry(option: Option) -> str:
    about = _documentation(option.owner).get(option.path[-1], "").replace("``", '"')
    value = option.default
    if not option.flag and value not in (None, "", ()) and value is not dataclasses.MISSING:
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        about = f"{about} (default: {shown})"
    name = option.name
    if option.flag and option.default is True:
        name, about = option.off, f"turn off: {about}"
    return _wrapped(about, f"  {name}{option.takes}")


def _wrapped(text: str, head: str) -> str:
    """A text behind its head, or below it where that is long."""
    width = max(40, min(shutil.get_terminal_size().columns, 110) - 1)
    if not head:
        return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))
    first = head.ljust(COLUMN) if len(head) < COLUMN else " " * COLUMN
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join([*([head] if len(head) >= COLUMN else []), *(lines or [head])])


@cache
def _documentation(owner: type) -> dict[str, str]:
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
