"""The causal convolution in plain PyTorch: what it means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import taps


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.causal_conv1d`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (batch, length, width), taps_count = x.shape, weight.shape[1]
    if initial_state is None:
        history = x.new_zeros(batch, taps_count - 1, width)
    else:
        history = initial_state.to(x.dtype).transpose(1, 2)
    row = torch.cat([history, x], dim=1)  # (b, k - 1 + l, i)
    if seq_idx is None or length == 0:
        windows = [row[:, tap : tap + length] for tap in range(taps_count)]  # oldest first
        final_state = row[:, length:].transpose(1, 2)
    else:
        index, inside = taps(seq_idx, taps_count)
        gathered = [
            row.gather(1, index[..., j, None].expand(-1, -1, width)).masked_fill(~inside[..., j, None], 0)
            for j in reversed(range(taps_count - 1))
        ]
        windows = [g[:, :-1] for g in gathered] + [x.masked_fill(seq_idx[..., None] < 0, 0)]
        final_state = torch.stack([g[:, -1] for g in gathered], dim=-1) if gathered else row[:, :0].transpose(1, 2)
    kernel = weight.to(dtype)
    y = sum((window.to(dtype) * kernel[:, tap] for tap, window in enumerate(windows)), torch.zeros_like(x, dtype=dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    if seq_idx is not None:
        y = y.masked_fill(seq_idx[..., None] < 0, 0)
    return y.to(x.dtype), final_state
