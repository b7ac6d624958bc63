"""Long sequences read piece by piece, the state carried over, so that memory does not grow with their length."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import Choice
from ..model import MoEMamba
from ..state import State

LOGITS = 1 << 26  # held at once

Routed = Callable[[int, list[Choice]], None]
"""told the first position of a piece, and what each router chose in it"""


def hidden_by_pieces(
    model: MoEMamba, tokens: Tensor, piece: int, dtype: torch.dtype, routed: Routed | None = None
) -> Iterator[tuple[int, Tensor]]:
    """What the head sees, piece by piece.

    Args:
        tokens: (b, l) int64 on the model's device.
        piece: positions read at once.
        dtype: of the activations.
    Yields:
        (first position, hidden (b, at most piece, d))
    """
    state: State | None = None
    for first in range(0, tokens.shape[1], piece):
        record: list[Choice] | None = [] if routed else None
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            hidden, state, _ = model.backbone(tokens[:, first : first + piece], state, record=record)
        if routed and record is not None:
            routed(first, record)
        yield first, hidden


def losses(
    model: MoEMamba, rows: Tensor, piece: int, dtype: torch.dtype = torch.float32, routed: Routed | None = None
) -> Tensor:
    """Cross-entropy of each token but the first, in nats: rows (b, l + 1) int64 -> (b, l) float32."""
    found = []
    for first, hidden in hidden_by_pieces(model, rows[:, :-1], piece, dtype, routed):
        targets = rows[:, first + 1 : first + 1 + hidden.shape[1]]
        found.append(_losses(model, hidden, targets, dtype))
    return torch.cat(found, 1)


def _losses(model: MoEMamba, hidden: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden (b, l, d), targets (b, l) -> (b, l); few logits at a time."""
    width = max(1, LOGITS // (len(hidden) * model.config.vocab_size))
    parts = []
    for some, wanted in zip(hidden.split(width, 1), targets.split(width, 1), strict=True):
        with torch.autocast(hidden.device.type, dtype, enabled=dtype != torch.float32):
            logits = model.head(some)
        parts.append(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view_as(wanted))
    return torch.cat(parts, 1)
