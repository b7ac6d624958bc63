"""One decoded token on a GPU: how the kernels of `triton_kernels.py` are cut and launched.

The host's choices depend on shapes alone, so that a CUDA graph can hold a step. No gradients: decoding has none.
"""

import torch
import triton
from torch import Tensor

from ..kit.triton import launch, overlap
from ..kit.triton_step import depth
from . import triton_cuts as cuts
from . import triton_many as triton_step_many
from .triton_kernels import best_kernel, choose_kernel, enter_kernel, leave_kernel, scan_kernel


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
    inner: None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`."""
    if x.shape[0] >= cuts.MANY:
        weights = (in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
        return triton_step_many.mamba_step(x, conv_state, ssm_state, weights, norm_weight, norm_bias, eps, in_place)
    (batch, _, d), (width, n), taps, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    x, conv_state, ssm_state = x.contiguous(), conv_state.contiguous(), ssm_state.contiguous()
    conv_after, ssm_after = (t if in_place else torch.empty_like(t) for t in (conv_state, ssm_state))
    chosen, pdl = r + 2 * n, overlap(x)
    P = max(16, triton.next_power_of_2(chosen))
    enter = cuts.cut("enter", batch)
    C = max(enter.columns, triton.next_power_of_2(triton.cdiv(width, 128)))  # x_proj's shares are few
    tiles = triton.cdiv(width, C)
    u, z, y = (x.new_empty(batch, width) for _ in range(3))
    parts = x.new_empty(tiles, batch, P, dtype=torch.float32)
    norm = 0 if norm_weight is None else 1 if norm_bias is None else 2
    grid = (tiles, triton.cdiv(batch, enter.rows))
    enter_kernel[grid](
        x, norm_weight, norm_bias, eps, in_proj, conv_state, conv_weight, conv_bias, x_proj,
        u, z, parts, conv_after, batch, d, width, chosen,
        NORM=norm, TAPS=taps, P=P, ROWS=enter.rows, C=C,
        **depth(enter._replace(columns=C), d), **launch(enter.warps, pdl),
    )  # fmt: skip
    scan = cuts.cut("scan", batch)
    channels = max(8, min(scan.columns, 1024 // triton.next_power_of_2(n)))
    scan_kernel[(triton.cdiv(width, channels), triton.cdiv(batch, scan.rows))](
        u, z, parts, tiles, dt_proj, dt_bias, A_log, D, ssm_state, ssm_after, y, batch, width, r, n,
        P=P, T=triton.next_power_of_2(tiles), R=triton.next_power_of_2(r), N=triton.next_power_of_2(n),
        ROWS=scan.rows, C=channels, **launch(scan.warps, pdl),
    )  # fmt: skip
    out, leave = torch.empty_like(x), cuts.cut("leave", batch)
    leave_kernel[(triton.cdiv(d, leave.columns), triton.cdiv(batch, leave.rows))](
        y, out_proj, None if norm_weight is None else x, out, batch, d, width,
        ROWS=leave.rows, C=leave.columns, **depth(leave, width), **launch(leave.warps, pdl),
    )  # fmt: skip
    return out, conv_after, ssm_after


def fits(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """See `moemamba.ops.fuses_mamba_step`."""
    same = all(weight.dtype == x.dtype and weight.is_contiguous() for weight in weights)
    return same and weights[-1].shape[1] <= cuts.WIDEST and x.shape[0] > 0


def linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_argmax`."""
    (batch, d), words = x.shape, weight.shape[0]
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    how, pdl = cuts.cut("best", batch), overlap(x)
    if x.dtype == torch.float32 and how.rows > 64:
        how = how._replace(depth=how.depth // 2)  # tiles of both sides fit the shared memory of smaller GPUs
    tiles = triton.cdiv(words, how.columns)
    best, index = x.new_empty(tiles, batch, dtype=torch.float32), x.new_empty(tiles, batch, dtype=torch.int32)
    token = x.new_empty(batch, dtype=torch.int64)
    best_kernel[(triton.cdiv(batch, how.rows), tiles)](
        x, weight, best, index, batch, d, words,
        ROWS=how.rows, C=how.columns, **depth(how, d), **launch(how.warps, pdl),
    )  # fmt: skip
    choose_kernel[(batch,)](
        best, index, token, tiles, batch, T=triton.next_power_of_2(tiles), **launch(4, pdl)
    )  # fmt: skip
    return token
