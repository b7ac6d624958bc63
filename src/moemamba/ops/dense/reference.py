"""Linear layers and the norm in plain PyTorch: what they mean."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `moemamba.ops.rms_norm`."""
    if weight is not None and weight.dtype != x.dtype:  # which torch would compute step by step, and warn of
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `moemamba.ops.linear`."""
    return F.linear(x, weight, bias)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.linear_beside`."""
    return x, F.linear(x, weight)
