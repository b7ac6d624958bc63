"""Linear layers and the norm in plain PyTorch: what they mean."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts.reference import ACTIVATIONS


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


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """See `moemamba.ops.norm_linear`."""
    if norm_weight is not None and norm_bias is None:
        x = rms_norm(x, norm_weight, eps)
    elif norm_weight is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return y if activation is None else ACTIVATIONS[activation](y)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """See `moemamba.ops.linear_add`."""
    return residual + linear(x, weight, None if bias is None else bias.to(weight.dtype))
