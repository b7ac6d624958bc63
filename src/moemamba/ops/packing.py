"""What `seq_idx` means, as index arithmetic that every backend shares.

`seq_idx (b, l)` says which sequence each position of a packed row belongs to; a negative entry is padding.
A sequence begins where the index differs from that of the last position before it that is not padding.
The first sequence of a row continues the state that is passed in, so it does not *begin* here.
"""

import torch
from torch import Tensor

PLAIN, BEGIN, PADDING = 0, 1, 2  # marks of a position: BEGIN, the state is reset before it; PADDING, nothing happens


def position_marks(seq_idx: Tensor) -> Tensor:
    """(b, l) int8: PLAIN, BEGIN or PADDING, what each position is to a recurrence."""
    valid, starts = boundaries(seq_idx)
    return torch.where(valid, starts * BEGIN, PADDING).to(torch.int8)


def boundaries(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions count, and where state is reset.

    Args:
        seq_idx: (b, l), any integer dtype.
    Returns:
        valid: (b, l) bool, False at padding.
        starts: (b, l) bool, True at the first position of every sequence but the row's first.
    """
    valid = seq_idx >= 0
    time = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last_valid = torch.where(valid, time, -1).cummax(dim=1).values  # (b, l), up to and including t
    previous = torch.nn.functional.pad(last_valid, (1, 0), value=-1)[:, :-1]  # strictly before t
    previous_id = seq_idx.gather(1, previous.clamp(min=0))
    starts = valid & (previous >= 0) & (seq_idx != previous_id)
    return valid, starts


def without_padding(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    """x (b, l, d) with zeros at padding, whatever was there: what is computed of it then stays finite."""
    if seq_idx is None:
        return x
    expect_numbers(seq_idx, x.shape[:2])
    return x.masked_fill((seq_idx < 0)[..., None], 0)


def expect_numbers(seq_idx: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError for a `seq_idx` of another shape (b, l), or one that is no numbers but a mask."""
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; expected {tuple(shape)}")
    if seq_idx.dtype == torch.bool or seq_idx.is_floating_point():
        raise ValueError(
            f"seq_idx is {seq_idx.dtype}; expected integers, the number of each position's sequence, or -1 at padding. "
            "Of a mask that is 1 at tokens and 0 at padding, mask.int() - 1 is one"
        )


def positions(seq_idx: Tensor, first: Tensor | None = None) -> Tensor:
    """Position of every token within its own sequence, padding not counted.

    Args:
        seq_idx: (b, l).
        first: (b,) position of the first token of each row's first sequence; zero if None.
    Returns:
        (b, l) int64; -1 at padding.
    """
    valid, starts = boundaries(seq_idx)
    rank = valid.long().cumsum(1) - 1  # tokens of the row before this one
    if first is not None:
        rank = rank + first[:, None]
    # The row's first sequence counts from zero (or from `first`), every later one from its own first token.
    origin = torch.where(starts, rank, 0).cummax(dim=1).values
    return torch.where(valid, rank - origin, -1)


def taps(seq_idx: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where a causal convolution of `width` taps reads from, in a row that `width - 1` positions of history precede.

    Padding is skipped, so that a window always holds the last tokens of its own sequence.

    Args:
        seq_idx: (b, l).
        width: taps of the convolution, k.
    Returns:
        index: (b, l + 1, k - 1) int64 into the `k - 1 + l` positions of history and row; [..., j] is j + 1 tokens back.
            The last of the `l + 1` rows is the window that is left behind for what follows (the final state).
        inside: (b, l + 1, k - 1) bool, False where the tap lies before the sequence's first token.
    """
    valid, starts = boundaries(seq_idx)
    history = width - 1
    with_history = torch.nn.functional.pad(valid, (history, 0), value=True)
    compact = (~with_history).to(torch.uint8).argsort(dim=1, stable=True)  # valid positions first, in order
    rank = with_history.long().cumsum(1)[:, history:]  # tokens up to and including t, history counted
    rank = torch.cat([rank - 1, rank[:, -1:]], dim=1)  # (b, l + 1): t's own place, and the place after the end
    origin = torch.where(starts, rank[:, :-1], 0).cummax(dim=1).values
    origin = torch.cat([origin, origin[:, -1:]], dim=1)
    source = rank[..., None] - torch.arange(1, width, device=seq_idx.device)  # (b, l + 1, k - 1)
    inside = source >= origin[..., None]
    index = compact.gather(1, source.clamp(min=0).flatten(1)).view_as(source)
    return index, inside
