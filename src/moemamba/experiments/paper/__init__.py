"""The paper's tables run again."""

from typing import TYPE_CHECKING, Any

from .tables import SCALES, TABLES, Entry, Scale, Table

if TYPE_CHECKING:
    from .running import plan, reproduce

__all__ = ["SCALES", "TABLES", "Entry", "Scale", "Table", "plan", "reproduce"]


def __getattr__(name: str) -> Any:
    if name in ("plan", "reproduce"):  # they need torch, without which the rest answers at once
        from . import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
