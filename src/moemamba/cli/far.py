"""What `moemamba eval --by-position` and `--recall` print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .terminal import show, show_json

if TYPE_CHECKING:
    from ..longcontext import ByPosition, Recalled


def tell_positions(found: "ByPosition", what: str, as_json: bool) -> None:
    """Loss by position, and how the routers' choices move."""
    if as_json:
        show_json({"text": what} | found.to_dict())
        return
    print(f"{found.sequences:,} sequences of {found.length:,} tokens of {found.documents:,} documents of {what}")
    print("loss in nats a token by how many tokens come before; ± is the standard error over documents\n")
    changes, gains = (any(getattr(each, name) is not None for each in found.bins) for name in ("change", "gain"))
    header = ["tokens before", "loss"]
    if changes and found.held_against is not None:
        held = found.bins[found.held_against]
        header.append(f"minus that of {_span(held.first, held.last)}")
    header += ["minus what forgets"] if gains else []
    rows = []
    for each in found.bins:
        row = [_span(each.first, each.last), _figure(each.loss, each.standard_error)]
        row += [_figure(each.change, each.change_error, "+")] if changes else []
        row += [_figure(each.gain, each.gain_error, "+")] if gains else []
        rows.append(row)
    show(rows, header)
    if found.routers:
        base = found.held_against or 0
        same = found.bins[found.held_against or 0]
        print("\nrouting: entropy of the experts' load, as a share of its maximum, and the share of the choices that")
        print(f"would have to move to make it that of {_span(same.first, same.last)}\n")
        show(
            [
                (_span(each.first, each.last), *(_routing(load, k, base) for load in found.routers))
                for k, each in enumerate(found.bins)
            ],
            ("tokens before", *(load.router for load in found.routers)),
        )


def tell_recall(found: Mapping[str, Sequence["Recalled"]], what: str, as_json: bool) -> None:
    """Accuracy and gain by distance, a table for each task."""
    if as_json:
        show_json({"text": what, "tasks": {name: [vars(each) for each in own] for name, own in found.items()}})
        return
    print(f"facts read so many tokens ago, with text of {what} in between")
    for name, own in found.items():
        print(f"\n{name}, {own[0].trials} trials each\n")
        rows = [
            (
                f"{each.distance:,}",
                f"{each.accuracy:.1%} ± {each.accuracy_error:.1%}",
                f"{each.loss:.4f}",
                _figure(each.gain, each.gain_error, "+"),
            )
            for each in own
        ]
        show(rows, ("tokens ago", "recalled", "loss of the answer", "known of it, nats a token"))


def distances(context: int) -> list[int]:
    """64, 256, 1,024, ... and the context."""
    found = [64 << k for k in range(0, 2 * context.bit_length(), 2) if 64 << k < context]
    return [*found, context]


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _figure(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    text = f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
    return text.replace("-", "−")


def _routing(load: Any, number: int, base: int) -> str:
    return f"{load.entropy(number):.3f}, {load.shift(number, base):.1%}"
