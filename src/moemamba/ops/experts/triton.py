"""Experts on the GPU: sort the choices by expert, multiply tile by tile, put the rows back.

No step waits for the host. The rows are copied in sorted order once, since products that gather their operands
themselves take longer than the copy; all other elementwise work (activation, gate, their derivatives, the way back to
the tokens' order) is part of the products. Weights may have another dtype than x, which the products run in; their
gradients come out of the float32 accumulators in the weights' dtype.

ReLU leaves the backward pass one bit a hidden feature to read, not its value: what the value was needed for besides its
sign, the gates' gradient, is <x, dx> / gate as well, since an expert without biases is homogeneous (Euler).
"""

from typing import Any

import torch
from torch import Tensor

from ..arguments import gradients_like
from ..kit.op import gradient, op
from ..kit.triton import blocks, programs, wide
from . import triton_few as triton_experts_few
from . import triton_kernels as kernels
from . import triton_products as products
from .triton_sort import Order, sort_by_expert


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""
    if triton_experts_few.fits(x, indices):
        return triton_experts_few.expert_feedforward(x, indices, gates, up, down, activation)
    return _feedforward(x, indices, gates, up, down, activation)[0]


def _keeps_signs(x: Tensor, activation: str) -> bool:
    """Whether ReLU's derivative is kept as bits; float16's range is too small for the gates' way there."""
    return activation == "relu" and x.dtype != torch.float16


def _keeps_copies(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether the weights are cast for the products, and then kept: casting takes a tenth of the backward pass."""
    return x.dtype not in (up.dtype, down.dtype)


def _like_outputs(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, ...]:
    n_experts, o, f = down.shape
    order = products.fake_order(x, indices, up, down)
    n_rows, d, width, groups = order.pairs.shape[0], wide(x.shape[1], x), wide(f, x), up.shape[1] // f
    rows, kept = x.new_empty(n_rows, d), x.new_empty(n_rows, groups, width)
    signs = order.bounds.new_empty(0)
    if _keeps_signs(x, activation):
        signs = products.room_for_signs(kept[:, 0], products.choose_tiles(x, indices.numel(), up, down))
    copied = _keeps_copies(x, up, down)
    wide_up = x.new_empty((n_experts, groups, width, d) if copied else 0)
    wide_down = x.new_empty((n_experts, o, width) if copied else 0)
    return x.new_empty(x.shape[0], o), rows, kept, signs, wide_up, wide_down, *order


@op("expert_feedforward", fake=_like_outputs)
def _feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (t, o), then what the backward pass needs: rows (r, d), kept and signs, the weights, and the three of `Order`.

    kept: (r, g, f) what went into the activation; what came out of it where signs are kept (`kernels._pack`).
    The weights are in the products' dtype; empty if they were in it before.
    """
    tiles = products.choose_tiles(x, indices.numel(), up, down)
    order = sort_by_expert(indices, up.shape[0], tiles.rows)
    wide_up, wide_down = products.prepare(up, down, x.dtype)
    n_experts, groups, width, depth = wide_up.shape
    rows = products.gather(x, None, order, indices.shape[1])
    hidden = rows.new_empty(rows.shape[0], width)
    if _keeps_signs(x, activation):
        before, kept, signs = None, hidden[:, None], products.room_for_signs(hidden, tiles)
    else:
        before = kept = rows.new_empty(rows.shape[0], groups, width)
        signs = order.bounds.new_empty(0)
    half = tiles.columns // 2
    kernels.first_product[programs(x, tiles)](
        blocks(rows, tiles.rows, tiles.depth),
        blocks(wide_up, 1, groups, tiles.columns // groups, tiles.depth),
        blocks(hidden, tiles.rows, half),
        None if before is None else blocks(before, tiles.rows, 1, half),
        signs if before is None else None,
        order.experts,
        order.bounds,
        n_experts,
        depth,
        width,
        ACTIVATION=activation,
        **products.options(tiles, tiles.stages - (before is not None)),  # the epilogue needs shared memory too
    )
    out = x.new_empty(indices.numel(), down.shape[1])
    products.last_product(hidden, wide_down, out, gates, order, tiles)
    copied = _keeps_copies(x, up, down)
    wide_up, wide_down = (w if copied else w.new_empty(0) for w in (wide_up, wide_down))
    return products.sum_choices(out, indices.shape[1]), rows, kept, signs, wide_up, wide_down, *order


def _like_gradients(
    dy: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, *_: Any
) -> list[Tensor]:
    return [dy.new_empty(indices.shape[0], up.shape[2]), *gradients_like(gates, up, down)]


@gradient(
    _feedforward,
    outputs="y, rows, kept, signs, wide_up, wide_down, pairs, experts, bounds",
    of="x, gates, up, down",
    fake=_like_gradients,
)
def _feedforward_backward(
    dy: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    rows: Tensor,
    kept: Tensor,
    signs: Tensor,
    wide_up: Tensor,
    wide_down: Tensor,
    pairs: Tensor,
    experts: Tensor,
    bounds: Tensor,
) -> list[Tensor]:
    order, (tokens, top_k), d = Order(pairs, experts, bounds), indices.shape, up.shape[2]
    tiles = products.choose_tiles(rows, tokens * top_k, up, down)
    if not _keeps_copies(rows, up, down):
        wide_up, wide_down = products.prepare(up, down, rows.dtype)
    n_experts, _, width, _ = wide_up.shape
    by_signs = _keeps_signs(rows, activation)
    dy_rows = products.gather(dy, gates if by_signs else None, order, top_k)
    hidden = kept[:, 0] if by_signs else rows.new_empty(rows.shape[0], width)
    dbefore = torch.empty_like(kept)
    whole, tiles = tiles, tiles._replace(columns=tiles.columns // (1 if by_signs else 2))  # more registers
    dgates = products.partial(gates, d if by_signs else width, tiles)
    if dgates is not None and not by_signs:
        dgates.zero_()  # of a dropped pair
    half = tiles.columns // 2
    kernels.last_product_backward[programs(rows, tiles)](
        blocks(dy_rows, tiles.rows, tiles.depth),
        blocks(wide_down, 1, tiles.depth, tiles.columns),
        None if by_signs else blocks(kept, tiles.rows, 1, half),
        signs if by_signs else None,
        blocks(dbefore, tiles.rows, 1, half),
        None if by_signs else blocks(hidden, tiles.rows, half),
        None if by_signs else gates,
        None if by_signs else dgates,
        *order,
        tokens * top_k,
        n_experts,
        wide_down.shape[1],
        width,
        ACTIVATION=activation,
        **products.options(tiles, tiles.stages - (not by_signs)),
    )
    tiles = whole
    dx = rows.new_empty(tokens * top_k, d)
    dbefore = dbefore.flatten(1)
    inputs = rows if by_signs and gates is not None else None
    products.last_product(
        dbefore, wide_up.flatten(1, 2), dx, gates if by_signs else None, order, tiles,
        transposed=True, inputs=inputs, dgates=dgates if by_signs else None, gated=True,
    )  # fmt: skip
    dup = products.weight_gradient(dbefore, rows, order, up.dtype, tiles).view(wide_up.shape)
    dup = dup[:, :, : down.shape[2], :d].reshape(up.shape)
    ddown = products.weight_gradient(dy_rows, hidden, order, down.dtype, tiles)
    ddown = ddown[:, : down.shape[1], : down.shape[2]].contiguous()
    return [products.sum_choices(dx, top_k), products.sum_partial(dgates, gates, rows), dup, ddown]
