"""What transformers' callers say of a batch, in our words."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sequences(
    rows: int,
    length: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor | None:
    """Which sequence each position of a call is of, (rows, length): -1 at padding; None if all are of one a row.

    Args:
        attention_mask: (rows, positions so far and now), 0 at padding; the last ones are those of this call.
        position_ids: (rows, length) or (1, length): a sequence begins where they do not go on by one.
        seq_idx: (rows, length) itself.
        cu_seq_lens: (n + 1,) where in one row sequences begin and the last ends.
    Raises:
        ValueError: a mask of another kind.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (rows, positions), 0 at padding: a "
            "recurrent layer cannot look at some earlier positions and not at others"
        )
    valid = None if attention_mask is None else attention_mask[:, -length:] != 0
    found = None if seq_idx is None else seq_idx.long()
    if found is None and position_ids is not None and length > 1:
        found = _by_positions(position_ids.expand(rows, -1), valid)
    if found is None and cu_seq_lens is not None and rows == 1 and len(cu_seq_lens) > 2:
        place = torch.arange(length, device=cu_seq_lens.device)
        found = torch.searchsorted(cu_seq_lens.long(), place, right=True)[None] - 1
    if valid is None or bool(valid.all()):
        return found
    return valid.long() - 1 if found is None else found.masked_fill(~valid, -1)


def _by_positions(position_ids: Tensor, valid: Tensor | None) -> Tensor | None:
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if valid is not None:
        begins = begins & valid[:, 1:] & valid[:, :-1]
    return F.pad(begins, (1, 0)).long().cumsum(1) if bool(begins.any()) else None
