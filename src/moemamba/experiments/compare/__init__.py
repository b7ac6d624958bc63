"""Models trained on the same batches over seeds."""

from typing import TYPE_CHECKING, Any

from .contender import CLOSE, Contender, parse_contender, parse_contenders, sized

if TYPE_CHECKING:
    from .comparing import compare

__all__ = ["CLOSE", "Contender", "compare", "parse_contender", "parse_contenders", "sized"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # needs torch, without which the rest answers at once
        from .comparing import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
