"""One vector of each sequence, for heads that classify it or put a number to it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops.packing import expect_numbers
from .linear import Linear
from .placing import placed

Pooling = Literal["last", "mean", "max"]


def pooled(hidden: Tensor, seq_idx: Tensor | None = None, pooling: Pooling = "last") -> Tensor:
    """One vector of each row, which is one sequence; what is padding has no part in it.

    Args:
        hidden: (b, l, d), such as of `MoEMamba.backbone`.
        seq_idx: (b, l); negative entries are padding, on either side. None: there is none.
        pooling: "last" is the last position, which has seen all others; or the mean or the maximum over positions.
    Returns:
        (b, d); zero for a row that is padding alone.
    Raises:
        ValueError: a shape that does not fit, or no such pooling.
    """
    if seq_idx is None:
        seq_idx = torch.zeros(hidden.shape[:2], dtype=torch.int32, device=hidden.device)
    if hidden.ndim != 3:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (b, l, d)")
    expect_numbers(seq_idx, hidden.shape[:2])
    valid = seq_idx >= 0
    there = valid.any(1, keepdim=True)  # (b, 1)
    inside = hidden.masked_fill(~valid[..., None], 0)  # filled, not multiplied: padding may be infinite
    if pooling == "mean":
        return inside.sum(1) / valid.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)
    if pooling == "max":
        return hidden.masked_fill(~valid[..., None], -torch.inf).amax(1).where(there, 0)
    if pooling != "last":
        raise ValueError(f'pooling is {pooling!r}; choose "last", "mean" or "max"')
    time = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, time, 0).amax(1)
    return inside[torch.arange(len(last), device=last.device), last]


class PooledHead(nn.Module):
    """`proj(pooled(hidden))`: scores of classes, or numbers, for each sequence.

    Args:
        d_model: width of the hidden vectors, d.
        outputs: classes, or numbers to predict, o.
        pooling: see `pooled`.
        device, dtype: of the parameters.
    """

    __call__: Callable[..., Tensor]

    @placed
    def __init__(
        self,
        d_model: int,
        outputs: int,
        pooling: Pooling = "last",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.pooling: Pooling = pooling
        self.proj = Linear(d_model, outputs)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """hidden (b, l, d), seq_idx (b, l) -> (b, o)."""
        y: Tensor = self.proj(pooled(hidden, seq_idx, self.pooling))
        return y
