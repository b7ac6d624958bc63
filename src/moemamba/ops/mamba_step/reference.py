"""One position of a Mamba layer in plain PyTorch: what it means."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.reference import causal_conv1d
from ..dense.reference import rms_norm
from ..scan.reference import selective_scan


class Inner(NamedTuple):
    """Root-mean-square norms of dt, B and C between what they are chosen from and what is done with them."""

    dt: Tensor | None
    """(r,) weights; None: ones"""
    B: Tensor | None
    """(n,)"""
    C: Tensor | None
    """(n,)"""
    eps: float


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    inner: Inner | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`."""
    n, h = A_log.shape[1], x
    if norm_weight is not None:
        h = (
            rms_norm(x, norm_weight, eps)
            if norm_bias is None
            else F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        )
    u, z = F.linear(h, in_proj).chunk(2, dim=-1)
    u, conv_after = causal_conv1d(u, conv_weight, conv_bias, "silu", conv_state, None)
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], n, n], dim=-1)
    if inner is not None:
        pairs = zip((dt, B, C), inner[:3], strict=True)
        dt, B, C = (rms_norm(part, weight, inner.eps).to(part.dtype) for part, weight in pairs)
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    dt = F.linear(dt, dt_proj, dt_bias)
    y, ssm_after = selective_scan(u, dt, A, B, C, D, z, None, True, ssm_state, None)
    y = F.linear(y, out_proj)
    if in_place:
        conv_after, ssm_after = conv_state.copy_(conv_after), ssm_state.copy_(ssm_after)
    return y if norm_weight is None else x + y, conv_after, ssm_after


def linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_argmax`."""
    return F.linear(x, weight.to(x.dtype)).argmax(dim=-1)
