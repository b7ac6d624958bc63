"""Models trained on the same batches over seeds."""

from typing import TYPE_CHECKING, Any

from .contender import Contender, parse_contender, parse_contenders

if TYPE_CHECKING:
    from .comparing import compare

__all__ = ["Contender", "compare", "parse_contender", "parse_contenders"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # needs torch, without which the rest answers at once
        from .comparing import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
