"""Loss by position: how well a token is predicted by how many come before it, to any length, and by which experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import Tokens
from ..layers import Choice
from ..model import MoEMamba
from ..training.blocks import standard_error
from .pieces import losses
from .sequences import sequences


@dataclass(frozen=True)
class Bin:
    """Predictions with about as many tokens before them."""

    first: int
    """tokens before the predicted one, at least"""
    last: int
    """and at most"""
    loss: float
    """nats a token"""
    standard_error: float | None
    """of the loss, over documents; None of one"""
    change: float | None = None
    """loss minus that of the bin it is held against, of the same sequences"""
    change_error: float | None = None
    gain: float | None = None
    """loss minus that of the same tokens where the model forgets all every so many tokens: below 0 where what lies
    farther back helps"""
    gain_error: float | None = None


@dataclass(frozen=True)
class Load:
    """One router by position."""

    router: str
    load: tuple[tuple[float, ...], ...]
    """of each bin, each expert's share of the choices"""

    def entropy(self, number: int) -> float:
        """Of a bin's load, as a share of the most that there can be: 1 is even."""
        shares = self.load[number]
        return -sum(p * math.log(p) for p in shares if p) / math.log(len(shares)) if len(shares) > 1 else 1.0

    def shift(self, number: int, other: int) -> float:
        """Share of the choices that would have to move to make one bin's load another's: 0 alike, 1 disjoint."""
        return sum(abs(a - b) for a, b in zip(self.load[number], self.load[other], strict=True)) / 2


@dataclass(frozen=True)
class ByPosition:
    """What was found."""

    length: int
    sequences: int
    documents: int
    bins: tuple[Bin, ...]
    held_against: int | None
    """number of the bin whose loss `Bin.change` is held against"""
    routers: tuple[Load, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; a figure that was not asked for is None."""
        base = self.held_against or 0
        return {
            "length": self.length,
            "sequences": self.sequences,
            "documents": self.documents,
            "bins": [vars(each) for each in self.bins],
            "routers": [
                {
                    "router": each.router,
                    "load": each.load,
                    "entropy": [each.entropy(number) for number in range(len(self.bins))],
                    "shift": [each.shift(number, base) for number in range(len(self.bins))],
                }
                for each in self.routers
            ],
        }


@torch.inference_mode()
def by_position(
    model: MoEMamba,
    tokens: Tokens,
    length: int,
    *,
    most: int | None = None,
    batch_size: int = 4,
    piece: int = 2048,
    across: bool = False,
    since: int | None = None,
    forgets: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ByPosition:
    """Loss in bins of positions, each twice as wide as the one before, over sequences of `length` tokens.

    Args:
        model: in evaluation mode.
        most, across: see `sequences`.
        batch_size: sequences read at once.
        piece: positions read at once; the state is carried from piece to piece.
        since: hold every bin's loss against that of the bin with this many tokens before.
        forgets: hold every loss against that of the same token where the model's state is emptied every so many tokens;
            must divide `length`.
    Raises:
        ValueError: no sequence is that long, or a number that does not fit.
    """
    if since is not None and not 1 <= since <= length:
        raise ValueError(f"since is {since}; choose a number of tokens from 1 to the context, {length}")
    if forgets is not None and (forgets < 1 or length % forgets):
        raise ValueError(f"forgets is {forgets}, which does not divide the context, {length}; choose a divisor")
    found = sequences(tokens, length, most, across)
    device = model.embedding.weight.device
    edges = bin_edges(length)
    bins = (
        torch.bucketize(torch.arange(1, length + 1, device=device), torch.tensor(edges, device=device), right=True) - 1
    )
    widths = torch.bincount(bins, minlength=len(edges))
    routing = _Routing(model, bins, len(edges))
    means, others = [], []
    for first in range(0, len(found.starts), batch_size):
        rows = _rows(tokens, found.starts[first : first + batch_size], length, model.config.vocab_size).to(device)
        loss = losses(model, rows, piece, dtype, routing.add if model.config.routers else None)
        means.append(_by_bin(loss, bins, widths))
        if forgets is not None:
            short = _forgetful(model, rows, forgets, piece, batch_size, dtype)
            others.append(_by_bin(loss - short, bins, widths))
    table = np.concatenate(means)
    gains = np.concatenate(others) if others else None
    held = None if since is None else int(np.searchsorted(edges, since, side="right") - 1)
    return ByPosition(
        length,
        len(found.starts),
        len(np.unique(found.groups)),
        tuple(_bin(number, edges, length, table, gains, held, found.groups) for number in range(len(edges))),
        held,
        routing.loads(),
    )


def bin_edges(length: int) -> list[int]:
    """Where bins of positions 1 .. length begin: 1, 2, 3, 5, 9, ..., so that they end at powers of two."""
    return [1, *(1 + (1 << k) for k in range((length - 1).bit_length()))]


def _rows(tokens: Tokens, starts: NDArray[np.int64], length: int, vocab_size: int) -> Tensor:
    """(b, length + 1) int64."""
    ids = tokens.ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    if (largest := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"the text holds the token {largest}, but the model has {vocab_size}; tokenise it with the model's own "
            "tokenizer"
        )
    return torch.from_numpy(ids)


def _forgetful(model: MoEMamba, rows: Tensor, every: int, piece: int, batch_size: int, dtype: torch.dtype) -> Tensor:
    """(b, l): the losses where the state is emptied every so many tokens."""
    windows = rows.unfold(1, every + 1, every).flatten(0, 1)  # (b l / every, every + 1)
    return torch.cat([losses(model, part, piece, dtype) for part in windows.split(batch_size)]).view(len(rows), -1)


def _by_bin(loss: Tensor, bins: Tensor, widths: Tensor) -> NDArray[np.float64]:
    """(b, l) -> (b, bins): means of each row."""
    sums = torch.zeros(len(loss), len(widths), dtype=torch.float64, device=loss.device)
    found: NDArray[np.float64] = (sums.index_add_(1, bins, loss.double()) / widths).cpu().numpy()
    return found


def _bin(
    number: int,
    edges: Sequence[int],
    length: int,
    table: NDArray[np.float64],
    gains: NDArray[np.float64] | None,
    held: int | None,
    groups: NDArray[np.int64],
) -> Bin:
    last = edges[number + 1] - 1 if number + 1 < len(edges) else length
    change = (None, None) if held is None else _mean(table[:, number] - table[:, held], groups)
    gain = (None, None) if gains is None else _mean(gains[:, number], groups)
    return Bin(edges[number], last, *_mean(table[:, number], groups), *change, *gain)


def _mean(values: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float, float | None]:
    """Mean over sequences, and its standard error over documents: sequences of one document are alike."""
    members = [values[groups == group] for group in np.unique(groups)]
    return float(values.mean()), standard_error([(len(own) / len(values), float(own.mean())) for own in members])


class _Routing:
    """Counts, for each router, how often each expert was chosen at positions of each bin."""

    def __init__(self, model: MoEMamba, bins: Tensor, count: int):
        self.names, self.bins, self.count = model.router_names, bins, count
        self.counts = [
            torch.zeros(count, experts.count, dtype=torch.int64, device=bins.device) for experts in model.config.routers
        ]

    def add(self, first: int, record: list[Choice]) -> None:
        """What each router chose, from a position on."""
        for counts, choice in zip(self.counts, record, strict=True):
            length = choice.indices.shape[1]
            places = self.bins[first : first + length, None] * counts.shape[1]
            flat = (places + choice.indices).flatten()
            counts += torch.bincount(flat, minlength=counts.numel()).view_as(counts)

    def loads(self) -> tuple[Load, ...]:
        shares = [counts.double() / counts.sum(1, keepdim=True) for counts in self.counts]
        return tuple(
            Load(name, tuple(map(tuple, share.tolist()))) for name, share in zip(self.names, shares, strict=True)
        )
