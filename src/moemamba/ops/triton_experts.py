"""Experts on the GPU: sort the choices by expert, multiply tile by tile, put the rows back.

No step waits for the host. The rows are copied in sorted order once, since products that gather their operands
themselves take longer than the copy; all other elementwise work (activation, gate, their derivatives, the way back to
the tokens' order) is part of the products. Weights may have another dtype than x, which the products run in; their
gradients come out of the float32 accumulators in the weights' dtype.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_experts_few
from . import triton_experts_kernels as kernels
from .triton_sort import Order, sort_by_expert


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""
    if triton_experts_few.fits(x, indices):
        return triton_experts_few.expert_feedforward(x, indices, gates, up, down, activation)
    return _feedforward(x, indices, gates, up, down, activation)[0]  # type: ignore[no-any-return]


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    return _linear(x, indices, gates, weight)[0]  # type: ignore[no-any-return]


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    row = torch.arange(x.shape[0], device=x.device)
    return expert_linear(x, torch.searchsorted(counts.cumsum(0), row, right=True)[:, None], None, weight)


class Tiles(NamedTuple):
    """How a product is cut into the work of programs."""

    rows: int
    columns: int
    depth: int
    stages: int  # tiles of the operands in flight
    warps: int


TILES = {
    "hopper": Tiles(rows=128, columns=256, depth=64, stages=4, warps=8),
    "ampere": Tiles(rows=128, columns=128, depth=32, stages=4, warps=8),
    "few tokens": Tiles(rows=16, columns=128, depth=64, stages=4, warps=4),
    "float32": Tiles(rows=64, columns=64, depth=32, stages=3, warps=4),
}


def choose_tiles(x: Tensor, n_pairs: int, n_experts: int) -> Tiles:
    """The entry of TILES for this much work; Hopper's needs more shared memory than smaller GPUs have."""
    if x.dtype == torch.float32:
        return TILES["float32"]
    if n_pairs < 32 * n_experts:
        return TILES["few tokens"]
    return TILES["hopper" if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else "ampere"]


@torch.library.custom_op("moemamba::expert_feedforward", mutates_args=())
def _feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (t, o), then what the backward pass needs: rows (r, d), kept (r, g, f), and the three of `Order`."""
    tiles = choose_tiles(x, indices.numel(), up.shape[0])
    order = sort_by_expert(indices, up.shape[0], tiles.rows)
    wide_up, wide_down = _prepare(up, down, x.dtype)
    n_experts, groups, width, depth = wide_up.shape
    rows, _ = _gather(x, None, order, indices.shape[1])
    hidden = rows.new_empty(rows.shape[0], width)
    before = hidden[:, None] if activation == "relu" else rows.new_empty(rows.shape[0], groups, width)
    half = tiles.columns // 2
    kernels.first_product[_programs(x)](
        _blocks(rows, tiles.rows, tiles.depth),
        _blocks(wide_up, 1, groups, tiles.columns // groups, tiles.depth),
        _blocks(hidden, tiles.rows, half),
        _blocks(before, tiles.rows, 1, half),
        order.experts,
        order.bounds,
        n_experts,
        depth,
        width,
        ACTIVATION=activation,
        **_options(tiles, tiles.stages - 1),  # the epilogue needs shared memory too
    )
    out = x.new_empty(indices.numel(), down.shape[1])
    _last_product(hidden, wide_down, out, gates, order, tiles)
    return _sum_choices(out, indices.shape[1]), rows, before, *order


@_feedforward.register_fake
def _(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, ...]:
    n_experts, o, f = down.shape
    order = _fake_order(x, indices, n_experts)
    n_rows = order.pairs.shape[0]
    rows, kept = x.new_empty(n_rows, _wide(x.shape[1], x)), x.new_empty(n_rows, up.shape[1] // f, _wide(f, x))
    return x.new_empty(x.shape[0], o), rows, kept, *order


@torch.library.custom_op("moemamba::expert_feedforward_backward", mutates_args=())
def _feedforward_backward(
    dy: Tensor,
    rows: Tensor,
    kept: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
    gates: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    widths: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgates (empty without gates), dup, ddown. widths: t, k, d."""
    order, (tokens, top_k, d) = Order(pairs, experts, bounds), widths
    tiles = choose_tiles(rows, tokens * top_k, up.shape[0])
    wide_up, wide_down = _prepare(up, down, rows.dtype)
    n_experts, _, width, _ = wide_up.shape
    dy_rows, dy_scaled = _gather(dy, gates, order, top_k)
    hidden = kept[:, 0] if activation == "relu" else rows.new_empty(rows.shape[0], width)
    dbefore = torch.empty_like(kept)
    whole, tiles = tiles, tiles._replace(columns=tiles.columns // (1 if activation == "relu" else 2))  # more registers
    dgates = _partial(gates, width, tiles)
    half = tiles.columns // 2
    kernels.last_product_backward[_programs(rows)](
        _blocks(dy_rows, tiles.rows, tiles.depth),
        _blocks(wide_down, 1, tiles.depth, tiles.columns),
        _blocks(kept, tiles.rows, 1, half),
        _blocks(dbefore, tiles.rows, 1, half),
        None if activation == "relu" else _blocks(hidden, tiles.rows, half),
        gates,
        dgates,
        *order,
        tokens * top_k,
        n_experts,
        wide_down.shape[1],
        width,
        ACTIVATION=activation,
        **_options(tiles, tiles.stages - 1),
    )
    tiles = whole
    dx = rows.new_empty(tokens * top_k, d)
    dbefore = dbefore.flatten(1)
    _last_product(dbefore, wide_up.flatten(1, 2), dx, None, order, tiles, transposed=True)
    dup = _weight_gradient(dbefore, rows, order, up.dtype, tiles).view(wide_up.shape)
    dup = dup[:, :, : down.shape[2], :d].reshape(up.shape)
    ddown = _weight_gradient(dy_scaled, hidden, order, down.dtype, tiles)
    ddown = ddown[:, : down.shape[1], : down.shape[2]].contiguous()
    return _sum_choices(dx, top_k), _sum_partial(dgates, gates, rows), dup, ddown


@_feedforward_backward.register_fake
def _(
    dy: Tensor,
    rows: Tensor,
    kept: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
    gates: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    widths: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgates = rows.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return rows.new_empty(widths[0], widths[2]), dgates, up.new_empty(up.shape), down.new_empty(down.shape)


def _keep_feedforward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, indices, gates, up, down, ctx.activation = inputs
    ctx.widths = [*indices.shape, x.shape[1]]
    ctx.save_for_backward(*output[1:], gates, up, down)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_feedforward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *_, gates, _, _ = saved = ctx.saved_tensors
    dx, dgates, dup, ddown = _feedforward_backward(dy, *saved, ctx.activation, ctx.widths)
    return dx, None, None if gates is None else dgates, dup, ddown, None


_feedforward.register_autograd(_differentiate_feedforward, setup_context=_keep_feedforward)


@torch.library.custom_op("moemamba::expert_linear", mutates_args=())
def _linear(
    x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (t, o), then what the backward pass needs: rows (r, d), and the three of `Order`."""
    tiles = choose_tiles(x, indices.numel(), weight.shape[0])
    order = sort_by_expert(indices, weight.shape[0], tiles.rows)
    rows, _ = _gather(x, None, order, indices.shape[1])
    out = x.new_empty(indices.numel(), weight.shape[1])
    _last_product(rows, _widen(weight.to(x.dtype), 2), out, gates, order, tiles)
    return _sum_choices(out, indices.shape[1]), rows, *order


@_linear.register_fake
def _(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    order = _fake_order(x, indices, weight.shape[0])
    rows = x.new_empty(order.pairs.shape[0], _wide(x.shape[1], x))
    return x.new_empty(x.shape[0], weight.shape[1]), rows, *order


@torch.library.custom_op("moemamba::expert_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    rows: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    widths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgates (empty without gates), dweight. widths: t, k, d."""
    order, (tokens, top_k, d) = Order(pairs, experts, bounds), widths
    tiles = choose_tiles(rows, tokens * top_k, weight.shape[0])
    dy_rows, dy_scaled = _gather(dy, gates, order, top_k)
    dx = rows.new_empty(tokens * top_k, d)
    dgates = _partial(gates, d, tiles)
    wide = _widen(weight.to(rows.dtype), 2)
    _last_product(
        dy_rows, wide, dx, gates, order, tiles, transposed=True, inputs=None if gates is None else rows, dgates=dgates
    )
    dweight = _weight_gradient(dy_scaled, rows, order, weight.dtype, tiles)[:, : weight.shape[1], :d].contiguous()
    return _sum_choices(dx, top_k), _sum_partial(dgates, gates, rows), dweight


@_linear_backward.register_fake
def _(
    dy: Tensor,
    rows: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    widths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    dgates = rows.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return rows.new_empty(widths[0], widths[2]), dgates, weight.new_empty(weight.shape)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, indices, gates, weight = inputs
    ctx.widths = [*indices.shape, x.shape[1]]
    ctx.save_for_backward(*output[1:], gates, weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_linear(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *_, gates, _ = saved = ctx.saved_tensors
    dx, dgates, dweight = _linear_backward(dy, *saved, ctx.widths)
    return dx, None, None if gates is None else dgates, dweight


_linear.register_autograd(_differentiate_linear, setup_context=_keep_linear)


def _gather(x: Tensor, gates: Tensor | None, order: Order, top_k: int) -> tuple[Tensor, Tensor]:
    """x's rows in sorted order, and the same times the pairs' gates."""
    n_experts = order.bounds.shape[0] // 2 - 1
    width = _wide(x.shape[1], x)
    rows = x.new_empty(order.pairs.shape[0], width)
    scaled = rows if gates is None else torch.empty_like(rows)
    columns = min(512, triton.next_power_of_2(width))
    kernels.gather[(triton.cdiv(rows.shape[0], 16), triton.cdiv(width, columns))](
        x.contiguous(), gates, rows, scaled, *order, n_experts, top_k, x.shape[1], width, ROWS=16, COLUMNS=columns
    )
    return rows, scaled


def _last_product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    gates: Tensor | None,
    order: Order,
    tiles: Tiles,
    transposed: bool = False,
    inputs: Tensor | None = None,
    dgates: Tensor | None = None,
) -> None:
    block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)
    kernels.last_product[_programs(x)](
        _blocks(x, tiles.rows, tiles.depth),
        _blocks(weight, 1, *block),
        out,
        gates,
        None if inputs is None else _blocks(inputs, tiles.rows, tiles.columns // 2),
        dgates,
        *order,
        out.shape[0],
        weight.shape[0],
        x.shape[1],
        out.shape[1],
        TRANSPOSED=transposed,
        **_options(tiles, tiles.stages if inputs is None else tiles.stages - 1),
    )


def _weight_gradient(dy: Tensor, x: Tensor, order: Order, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    n_experts, height, width = order.bounds.shape[0] // 2 - 1, dy.shape[1], x.shape[1]
    out = dy.new_empty(n_experts, height, width, dtype=dtype)
    tiles = tiles._replace(rows=max(64, tiles.rows), depth=min(tiles.rows, tiles.depth))
    kernels.weight_gradient[(n_experts * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns),)](
        _blocks(dy, tiles.depth, tiles.rows),
        _blocks(x, tiles.depth, tiles.columns),
        out,
        order.bounds,
        height,
        width,
        **_options(tiles, tiles.stages),
    )
    return out


def _sum_choices(out: Tensor, top_k: int) -> Tensor:
    """(p, n) -> (t, n)."""
    return out if top_k == 1 else out.view(-1, top_k, out.shape[1]).sum(1, dtype=out.dtype)


def _partial(gates: Tensor | None, width: int, tiles: Tiles) -> Tensor | None:
    """Room for each column tile's share of d(gates); zero where a pair is dropped, which no program writes."""
    return None if gates is None else gates.new_zeros(triton.cdiv(width, tiles.columns), gates.numel())


def _sum_partial(dgates: Tensor | None, gates: Tensor | None, like: Tensor) -> Tensor:
    if dgates is None or gates is None:
        return like.new_empty(0)
    return dgates.sum(0, dtype=gates.dtype).view(gates.shape)


def _prepare(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """up (e, g, f, d) and down (e, o, f) in the products' dtype, their inner widths widened where they must be."""
    n_experts, f = down.shape[0], down.shape[2]
    up = up.to(dtype).view(n_experts, -1, f, up.shape[2])
    return _widen(up, 2), _widen(down.to(dtype), 2)


def _wide(width: int, x: Tensor) -> int:
    """Columns of a row that tensor descriptors accept: whole blocks of 16 bytes."""
    step = 16 // x.element_size()
    return (width + step - 1) // step * step


def _widen(weight: Tensor, dims: int) -> Tensor:
    """Zeros behind the last `dims` widths, up to `_wide`."""
    missing = [amount for size in weight.shape[: -dims - 1 : -1] for amount in (0, _wide(size, weight) - size)]
    return (F.pad(weight, missing) if any(missing) else weight).contiguous()


def _blocks(tensor: Tensor, *shape: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(shape))


def _options(tiles: Tiles, stages: int) -> dict[str, Any]:
    return {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "num_stages": stages,
        "num_warps": tiles.warps,
    }


def _programs(x: Tensor) -> tuple[int]:
    """A persistent kernel's grid: one program a multiprocessor."""
    return (_multiprocessors(x.device) if x.is_cuda else 2,)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fake_order(x: Tensor, indices: Tensor, n_experts: int) -> Order:
    tile = choose_tiles(x, indices.numel(), n_experts).rows
    n_tiles = indices.numel() // tile + n_experts + 1
    return Order(
        *(indices.new_empty(size, dtype=torch.int32) for size in (n_tiles * tile, n_tiles, 2 * (n_experts + 1) + 1))
    )
