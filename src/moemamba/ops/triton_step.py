"""One decoded token on a GPU: how the kernels of `triton_step_kernels.py` are cut and launched.

The host's choices depend on shapes alone, so that a CUDA graph can hold a step. No gradients: decoding has none.
"""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .triton_step_kernels import best_kernel, choose_kernel, enter_kernel, leave_kernel, scan_kernel

WIDEST = 8192  # d_inner that these kernels are cut for; wider layers fill the GPU with ordinary products
PDL = os.environ.get("TRITON_INTERPRET") != "1"  # kernels overlap where the GPU can (Hopper and later)


class Cut(NamedTuple):
    """How a kernel is cut into the work of programs: rows of the batch, columns of its output, terms of a sum."""

    rows: int
    columns: int
    depth: int
    warps: int


# By the most rows of a batch; None is any number.
CUTS: dict[int | None, dict[str, Cut]] = {
    1: {
        "enter": Cut(1, 8, 1024, 4),
        "scan": Cut(1, 32, 0, 4),
        "leave": Cut(1, 4, 1024, 4),
        "best": Cut(1, 64, 1024, 8),
    },
    16: {
        "enter": Cut(16, 16, 256, 4),
        "scan": Cut(1, 32, 0, 4),
        "leave": Cut(16, 16, 256, 4),
        "best": Cut(16, 64, 128, 4),
    },
    64: {
        "enter": Cut(32, 16, 128, 4),
        "scan": Cut(4, 64, 0, 4),
        "leave": Cut(32, 16, 128, 4),
        "best": Cut(64, 128, 64, 4),
    },
    None: {
        "enter": Cut(32, 32, 128, 4),
        "scan": Cut(8, 64, 0, 4),
        "leave": Cut(32, 32, 128, 4),
        "best": Cut(128, 128, 64, 8),
    },
}


def cut(kernel: str, batch: int) -> Cut:
    """An explicit rule, so that nothing is searched for at the first token."""
    return next(cuts[kernel] for most, cuts in CUTS.items() if most is None or batch <= most)


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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`."""
    (batch, _, d), (width, n), taps, r = x.shape, A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    x, conv_state, ssm_state = x.contiguous(), conv_state.contiguous(), ssm_state.contiguous()
    conv_after, ssm_after = (t if in_place else torch.empty_like(t) for t in (conv_state, ssm_state))
    chosen, pdl = r + 2 * n, _overlap(x)
    P = max(16, triton.next_power_of_2(chosen))
    enter = cut("enter", batch)
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
        **_depth(enter._replace(columns=C), d), **_launch(enter.warps, pdl),
    )  # fmt: skip
    scan = cut("scan", batch)
    channels = max(8, min(scan.columns, 1024 // triton.next_power_of_2(n)))
    scan_kernel[(triton.cdiv(width, channels), triton.cdiv(batch, scan.rows))](
        u, z, parts, tiles, dt_proj, dt_bias, A_log, D, ssm_state, ssm_after, y, batch, width, r, n,
        P=P, T=triton.next_power_of_2(tiles), R=triton.next_power_of_2(r), N=triton.next_power_of_2(n),
        ROWS=scan.rows, C=channels, **_launch(scan.warps, pdl),
    )  # fmt: skip
    out, leave = torch.empty_like(x), cut("leave", batch)
    leave_kernel[(triton.cdiv(d, leave.columns), triton.cdiv(batch, leave.rows))](
        y, out_proj, None if norm_weight is None else x, out, batch, d, width,
        ROWS=leave.rows, C=leave.columns, **_depth(leave, width), **_launch(leave.warps, pdl),
    )  # fmt: skip
    return out, conv_after, ssm_after


def fits(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """See `moemamba.ops.fuses_mamba_step`."""
    same = all(weight.dtype == x.dtype and weight.is_contiguous() for weight in weights)
    return same and weights[-1].shape[1] <= WIDEST and x.shape[0] > 0


def linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_argmax`."""
    (batch, d), words = x.shape, weight.shape[0]
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    how, pdl = cut("best", batch), _overlap(x)
    tiles = triton.cdiv(words, how.columns)
    best, index = x.new_empty(tiles, batch, dtype=torch.float32), x.new_empty(tiles, batch, dtype=torch.int32)
    token = x.new_empty(batch, dtype=torch.int64)
    best_kernel[(triton.cdiv(batch, how.rows), tiles)](
        x, weight, best, index, batch, d, words,
        ROWS=how.rows, C=how.columns, **_depth(how, d), **_launch(how.warps, pdl),
    )  # fmt: skip
    choose_kernel[(batch,)](
        best, index, token, tiles, batch, T=triton.next_power_of_2(tiles), **_launch(4, pdl)
    )  # fmt: skip
    return token


def _depth(how: Cut, length: int) -> dict[str, Any]:
    """How the sum over `length` is cut."""
    most = 32768 if how.warps > 4 else 8192  # weights that a program's registers hold
    depth = max(16, min(how.depth, most // how.columns, triton.next_power_of_2(length)))
    return {"DEPTH": depth, "CHUNKS": triton.cdiv(length, depth), "DOT": how.rows > 1}


def _launch(warps: int, pdl: bool) -> dict[str, Any]:
    return {"num_warps": warps, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})


def _overlap(x: Tensor) -> bool:
    return PDL and x.is_cuda and _capability(x.device) >= 9


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
