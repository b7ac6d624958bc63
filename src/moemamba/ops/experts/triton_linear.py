"""Linear experts on the GPU: one product in the way of `triton_experts.py`."""

from typing import Any

import torch
from torch import Tensor

from ..kit.triton import wide
from . import triton_products as products
from .triton_sort import Order, sort_by_expert


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    return _linear(x, indices, gates, weight)[0]  # type: ignore[no-any-return]


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    row = torch.arange(x.shape[0], device=x.device)
    return expert_linear(x, torch.searchsorted(counts.cumsum(0), row, right=True)[:, None], None, weight)


@torch.library.custom_op("moemamba::expert_linear", mutates_args=())
def _linear(
    x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (t, o), then what the backward pass needs: rows (r, d), and the three of `Order`."""
    tiles = products.choose_tiles(x, indices.numel(), weight)
    order = sort_by_expert(indices, weight.shape[0], tiles.rows)
    rows = products.gather(x, None, order, indices.shape[1])
    out = x.new_empty(indices.numel(), weight.shape[1])
    products.last_product(rows, products.widen(weight.to(x.dtype), 2), out, gates, order, tiles)
    return products.sum_choices(out, indices.shape[1]), rows, *order


@_linear.register_fake
def _(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    order = products.fake_order(x, indices, weight)
    rows = x.new_empty(order.pairs.shape[0], wide(x.shape[1], x))
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
    tiles = products.choose_tiles(rows, tokens * top_k, weight)
    dy_rows = products.gather(dy, None, order, top_k)
    dy_scaled = dy_rows if gates is None else products.gather(dy, gates, order, top_k)
    dx = rows.new_empty(tokens * top_k, d)
    dgates = products.partial(gates, d, tiles)
    wide = products.widen(weight.to(rows.dtype), 2)
    products.last_product(
        dy_rows, wide, dx, gates, order, tiles, transposed=True, inputs=None if gates is None else rows, dgates=dgates
    )
    dweight = products.weight_gradient(dy_scaled, rows, order, weight.dtype, tiles)[
        :, : weight.shape[1], :d
    ].contiguous()
    return products.sum_choices(dx, top_k), products.sum_partial(dgates, gates, rows), dweight


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
