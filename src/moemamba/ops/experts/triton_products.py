"""What the products of `triton.py` and `triton_linear.py` share: tiles, launches, and the rows' way."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..kit.triton import Tiles, aligned, blocks, programs, wide
from . import triton_kernels as kernels
from .triton_sort import Order

TILES = {
    "hopper": Tiles(rows=128, columns=256, depth=64, stages=4, warps=8),
    "narrow": Tiles(rows=64, columns=128, depth=64, stages=3, warps=4, programs=3),
    "ampere": Tiles(rows=128, columns=128, depth=32, stages=4, warps=8),
    "few tokens": Tiles(rows=16, columns=128, depth=64, stages=4, warps=4),
    "float32": Tiles(rows=64, columns=64, depth=32, stages=3, warps=4),
}


def choose_tiles(x: Tensor, n_pairs: int, *weights: Tensor) -> Tiles:
    """The entry of TILES for this much work; Hopper's need more shared memory than smaller GPUs have."""
    if x.dtype == torch.float32:
        return TILES["float32"]
    if n_pairs < 32 * weights[0].shape[0]:
        return TILES["few tokens"]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < 9:
        return TILES["ampere"]
    return TILES["narrow" if max(size for w in weights for size in w.shape[1:]) <= 128 else "hopper"]


def gather(x: Tensor, gates: Tensor | None, order: Order, top_k: int) -> Tensor:
    """x's rows in sorted order, times the pairs' gates if there are any."""
    n_experts = order.bounds.shape[0] // 2 - 1
    width = wide(x.shape[1], x)
    rows = x.new_empty(order.pairs.shape[0], width)
    columns = min(512, triton.next_power_of_2(width))
    height = min(order.pairs.shape[0] // order.experts.shape[0], 8192 // columns)  # within a tile, all or none is used
    kernels.gather[(triton.cdiv(rows.shape[0], height), triton.cdiv(width, columns))](
        x.contiguous(), gates, rows, *order, n_experts, top_k, x.shape[1], width, ROWS=height, COLUMNS=columns
    )
    return rows


def last_product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    gates: Tensor | None,
    order: Order,
    tiles: Tiles,
    transposed: bool = False,
    inputs: Tensor | None = None,
    dgates: Tensor | None = None,
    gated: bool = False,
) -> None:
    """See `kernels.last_product`."""
    block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)
    kernels.last_product[programs(x, tiles)](
        blocks(x, tiles.rows, tiles.depth),
        blocks(weight, 1, *block),
        out,
        gates,
        None if inputs is None else blocks(inputs, tiles.rows, tiles.columns // 2),
        dgates,
        *order,
        out.shape[0],
        weight.shape[0],
        x.shape[1],
        out.shape[1],
        TRANSPOSED=transposed,
        GATED=gated,
        **options(tiles, tiles.stages),
    )


def weight_gradient(dy: Tensor, x: Tensor, order: Order, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    n_experts, height, width = order.bounds.shape[0] // 2 - 1, dy.shape[1], x.shape[1]
    out = dy.new_empty(n_experts, height, width, dtype=dtype)
    tiles = tiles._replace(rows=max(64, tiles.rows), depth=min(tiles.rows, tiles.depth))
    kernels.weight_gradient[(n_experts * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns),)](
        blocks(dy, tiles.depth, tiles.rows),
        blocks(x, tiles.depth, tiles.columns),
        out,
        order.bounds,
        height,
        width,
        **options(tiles, tiles.stages),
    )
    return out


def sum_choices(out: Tensor, top_k: int) -> Tensor:
    """(p, n) -> (t, n)."""
    if top_k == 1:
        return out
    y = out.new_empty(out.shape[0] // top_k, out.shape[1])
    columns = min(128, triton.next_power_of_2(out.shape[1]))
    if y.numel():
        kernels.sum_choices[(triton.cdiv(y.shape[0], 32), triton.cdiv(y.shape[1], columns))](
            out, y, *y.shape, K=top_k, ROWS=32, COLUMNS=columns
        )
    return y


def partial(gates: Tensor | None, width: int, tiles: Tiles) -> Tensor | None:
    """Room for each column tile's share of d(gates)."""
    return None if gates is None else gates.new_empty(triton.cdiv(width, tiles.columns), gates.numel())


def room_for_signs(hidden: Tensor, tiles: Tiles) -> Tensor:
    """For the bits of `kernels.pack`: eight words a row for each column tile."""
    across = triton.cdiv(hidden.shape[1], tiles.columns)
    return hidden.new_empty(hidden.shape[0], across * kernels.WORDS, dtype=torch.int32)


def sum_partial(dgates: Tensor | None, gates: Tensor | None, like: Tensor) -> Tensor:
    if dgates is None or gates is None:
        return like.new_empty(0)
    return dgates.sum(0, dtype=gates.dtype).view(gates.shape)


def prepare(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """up (e, g, f, d) and down (e, o, f) in the products' dtype, their inner widths widened where they must be."""
    n_experts, f = down.shape[0], down.shape[2]
    up = up.to(dtype).view(n_experts, -1, f, up.shape[2])
    return widen(up, 2), widen(down.to(dtype), 2)


def widen(weight: Tensor, dims: int) -> Tensor:
    """Zeros behind the last `dims` widths, up to `wide`."""
    missing = [amount for size in weight.shape[: -dims - 1 : -1] for amount in (0, wide(size, weight) - size)]
    return aligned(F.pad(weight, missing) if any(missing) else weight)


def options(tiles: Tiles, stages: int) -> dict[str, Any]:
    return {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "num_stages": stages,
        "num_warps": tiles.warps,
    }


def fake_order(x: Tensor, indices: Tensor, *weights: Tensor) -> Order:
    n_experts, tile = weights[0].shape[0], choose_tiles(x, indices.numel(), *weights).rows
    n_tiles = indices.numel() // tile + n_experts + 1
    return Order(
        *(indices.new_empty(size, dtype=torch.int32) for size in (n_tiles * tile, n_tiles, 2 * (n_experts + 1) + 1))
    )
