"""What `moemamba COMMAND --help` prints, from the dataclass of the command: first what most people set."""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Sequence

from ..marks import texts
from .options import Option, options

FEW = 18  # options that are shown at once, where not all are among what most people set
COLUMN = 28  # where the texts begin


def page(kind: type, command: str, default: object = None, every: bool = False) -> str:
    """The help of a command.

    Args:
        default: an instance that has the defaults.
        every: all options, not only those that are set most often.
    """
    known = list(options(kind, default))
    named = [option for option in known if not option.positional]
    free = [option for option in known if option.positional]
    parts = _grouped(kind, named)
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


def _grouped(kind: type, known: Sequence[Option]) -> list[tuple[str, list[Option]]]:
    """Options under titles: their groups as they are marked, behind the command's own, and parts under what they are.

    The first group is the first page.
    """
    titles = list(dict.fromkeys(option.group for option in known if option.group))
    groups: dict[str, list[Option]] = {title: [] for title in titles}
    for option in known:
        title, part = option.group, option.name.removeprefix("--").rpartition(".")[0]
        if not title and titles and option.owner is kind:
            title = titles[0]
        if not title and part:
            about = (option.owner.__doc__ or "").strip().partition("\n")[0].rstrip(".")
            title = f"{part}: {about}"
        groups.setdefault(title, []).append(option)
    return [
        (title, sorted(found, key=lambda option: (option.group != "", option.place))) for title, found in groups.items()
    ]


def _entry(option: Option) -> str:
    about = texts(option.owner).get(option.path[-1], "").replace("``", '"')
    value = option.default
    if not option.flag and value not in (None, "", (), {}) and value is not dataclasses.MISSING:
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
