"""Linear experts on the GPU: one product in the way of `triton.py`."""

from typing import Any

import torch
from torch import Tensor

from ..arguments import gradients_like
from ..kit.op import gradient, op
from ..kit.triton import wide
from . import triton_products as products
from .triton_sort import Order, sort_by_expert


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    return _linear(x, indices, gates, weight)[0]


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    row = torch.arange(x.shape[0], device=x.device)
    return expert_linear(x, torch.searchsorted(counts.cumsum(0), row, right=True)[:, None], None, weight)


def _like_outputs(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    order = products.fake_order(x, indices, weight)
    rows = x.new_empty(order.pairs.shape[0], wide(x.shape[1], x))
    return x.new_empty(x.shape[0], weight.shape[1]), rows, *order


@op("expert_linear", fake=_like_outputs)
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


def _like_gradients(dy: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor, *_: Any) -> list[Tensor]:
    return [dy.new_empty(indices.shape[0], weight.shape[2]), *gradients_like(gates, weight)]


@gradient(_linear, outputs="y, rows, pairs, experts, bounds", of="x, gates, weight", fake=_like_gradients)
def _linear_backward(
    dy: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    rows: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
) -> list[Tensor]:
    order, (tokens, top_k), d = Order(pairs, experts, bounds), indices.shape, weight.shape[2]
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
    return [products.sum_choices(dx, top_k), products.sum_partial(dgates, gates, rows), dweight]
