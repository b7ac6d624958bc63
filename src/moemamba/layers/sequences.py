"""Sequences of several lengths as one batch: padded, or one behind the other. Marks are those of every `seq_idx`."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def padded(lengths: Tensor, length: int | None = None, side: Literal["right", "left"] = "right") -> Tensor:
    """The `seq_idx` of rows of which each is one sequence, padded to one length.

    Args:
        lengths: (b,) integers, of the sequences.
        length: l, of a row; that of the longest sequence if None.
        side: where the padding is.
    Returns:
        (b, l) int32: 0, and -1 at padding, which changes no sequence and has output zero. What HF calls attention_mask
        is `seq_idx >= 0`.
    Raises:
        ValueError: a sequence is longer than a row, or lengths are no integers (b,).
    """
    if lengths.ndim != 1 or lengths.dtype == torch.bool or lengths.is_floating_point():
        raise ValueError(f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; expected integers (b,)")
    longest = int(lengths.max()) if lengths.numel() else 0
    length = longest if length is None else length
    if longest > length or (lengths < 0).any():
        raise ValueError(f"lengths are {lengths.tolist()}; expected 0 to length = {length}")
    places = torch.arange(length, device=lengths.device)
    behind = places >= lengths[:, None] if side == "right" else places < length - lengths[:, None]
    return torch.zeros_like(behind, dtype=torch.int32).masked_fill(behind, -1)


def packed(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences one behind the other in a row, which nothing passes between.

    Args:
        sequences: (l_j, ...) each, of tokens or of vectors.
    Returns:
        (1, sum l_j, ...), and its `seq_idx` (1, sum l_j) int32: 0, 1, 2, ...
    Raises:
        ValueError: there is none.
    """
    if not sequences:
        raise ValueError("sequences is empty; give one or more")
    counts = torch.tensor([len(each) for each in sequences], device=sequences[0].device)
    numbers = torch.arange(len(sequences), dtype=torch.int32, device=sequences[0].device)
    return torch.cat(list(sequences))[None], numbers.repeat_interleave(counts)[None]
