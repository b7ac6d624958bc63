"""The head's loss in plain PyTorch: what it means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kit.recompute import recomputed

LOSS_CHUNK = 1024  # tokens whose logits exist at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    hidden = hidden.masked_fill((targets == ignore_index)[:, None], 0)  # be it not a number
    for h, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
        total = total + recomputed(_summed_loss, h, weight, t, ignore_index, dtype)
    if reduction == "mean":
        return total / (targets != ignore_index).sum()
    return total


def _summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    return F.cross_entropy(logits.to(dtype), targets, ignore_index=ignore_index, reduction="sum")
