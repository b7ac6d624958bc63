"""One decoded token's experts on a GPU: how the kernels of `triton_kernels.py` are cut and launched.

Few choices read the weights of their experts each for itself: two launches where the router fits into the first, three
otherwise. Many are grouped by expert within the kernels, each of which is (an expert, some of its outputs): three
launches, of which the first is small and overlaps the next one's weights; one more where there are so many choices that
a program would be long in looking for its own, and one more to sum several choices of a row. Nothing is sorted, and the
host's choices depend on shapes alone, so that a CUDA graph can hold a step.

What bounds it is the weights: an expert of d 512, f 1536 is 3.1 MB of bfloat16, so a row's expert takes 0.75 us at 4.2
TB/s, 28 experts of 64 rows 21 us, all 32 of 256 rows 24 us. Per launch about 2.5 us remain, unless it overlaps.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..experts import GATED
from ..kit.triton import launch, overlap
from ..kit.triton_step import Cut, depth
from . import triton_kernels as kernels

FEW = 16  # choices up to which each reads its expert's weights for itself
ALONE = 264  # programs of the first kernel up to which each routes for itself
SEARCHED = 256  # choices up to which a program looks for its own among all of them
ROUTER = 8192  # weights of the router that a program of eight warps holds at once
STAGES = 4  # tiles of weights on their way at once, less one
# By the average number of choices of an expert: rows of a tile, outputs, terms of a sum at once, warps.
UP = {16: Cut(16, 32, 128, 4), 32: Cut(32, 32, 128, 4), None: Cut(64, 64, 64, 4)}
DOWN = {16: Cut(16, 16, 128, 4), 32: Cut(32, 32, 128, 4), None: Cut(64, 64, 64, 4)}
UP_FEW, DOWN_FEW = Cut(1, 16, 1024, 8), Cut(1, 4, 2048, 4)


def moe_step(
    x: Tensor,
    router: Tensor,
    balance_bias: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str = "relu",
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `moemamba.ops.moe_step`."""
    (batch, _, d), (n_experts, _, f) = x.shape, down.shape
    rows, pairs = x.reshape(batch, d).contiguous(), batch * top_k
    residual = None if norm_weight is None else rows
    norm = 0 if norm_weight is None else 1 if norm_bias is None else 2
    normed = (norm_weight, norm_bias, eps, router, logit_bias, balance_bias)
    how: dict[str, Any] = {"NORM": norm, "SIGMOID": scores == "sigmoid", "K": top_k}
    how["E"] = max(16, triton.next_power_of_2(n_experts))
    indices = x.new_empty(pairs, dtype=torch.int32)
    gates = x.new_empty(pairs, dtype=torch.float32)
    groups, pdl = 2 if activation in GATED else 1, overlap(x)
    biases = {"up": up_bias, "down": down_bias}
    few = UP_FEW._replace(columns=UP_FEW.columns // groups)
    programs = triton.cdiv(f, few.columns) * pairs
    if pairs > FEW or programs > ALONE:
        h = torch.empty_like(rows) if norm else rows
        _route(rows, normed, h, indices, gates, how, pdl)
        rows, how["NORM"] = h, 0
    if pairs > FEW:
        y = _many(rows, indices, gates, up, down, biases, residual, top_k, activation, pdl)
        return y.view(batch, 1, d)
    hidden, y = x.new_empty(pairs, f), x.new_empty(batch, d)
    wide = min(ROUTER // how["E"] if how["E"] <= 32 else 32, triton.next_power_of_2(d))  # wider it needs all registers
    tiles = triton.cdiv(f, few.columns)
    kernels.up_few_kernel[(tiles, pairs)](
        rows, *normed, indices, gates, up, up_bias, down, hidden, n_experts, d, f,
        ROUTE=programs <= ALONE, ACTIVATION=activation, GROUPS=groups, WIDE=wide, WIDES=triton.cdiv(d, wide),
        C=few.columns, LINES=_lines(triton.cdiv(d * f, tiles), down), ROUTER=_lines(n_experts * d, router),
        **how, **_sum(few, d), **launch(few.warps, pdl),
    )  # fmt: skip
    few = DOWN_FEW
    kernels.down_few_kernel[(triton.cdiv(d, few.columns), batch)](
        hidden, indices, gates, down, down_bias, residual, y, d, f,
        K=top_k, C=few.columns, **_sum(few, f), **launch(few.warps, pdl),
    )  # fmt: skip
    return y.view(batch, 1, d)


def _sum(how: Cut, length: int) -> dict[str, Any]:
    """`depth` for kernels that know no tensor cores."""
    return {name: value for name, value in depth(how, length).items() if name != "DOT"}


def _lines(size: int, weight: Tensor) -> int:
    """Blocks of 128 bytes that hold so many entries, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(size * weight.element_size(), 128))  # type: ignore[no-any-return]


def _route(x: Tensor, normed: Any, h: Tensor, indices: Tensor, gates: Tensor, how: dict[str, Any], pdl: bool) -> None:
    """Norm, router and choices of all rows: h, indices and gates are filled."""
    (batch, d), n_experts = x.shape, normed[3].shape[0]
    rows = 1 if batch <= FEW else 16
    cut = depth(Cut(rows, how["E"], 512 if rows == 1 else 128, 8), d)
    cut["DEPTH"] = min(cut["DEPTH"], max(16, ROUTER // how["E"]))
    cut["CHUNKS"] = triton.cdiv(d, cut["DEPTH"])
    kernels.route_kernel[(triton.cdiv(batch, rows),)](
        x, *normed, h, indices, gates, batch, n_experts, d, ROWS=rows, **how, **cut, **launch(8, pdl)
    )


def _many(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    biases: dict[str, Tensor | None],
    residual: Tensor | None,
    top_k: int,
    activation: str,
    pdl: bool,
) -> Tensor:
    """The experts of many choices, grouped."""
    (batch, d), (n_experts, _, f), pairs = x.shape, down.shape, indices.shape[0]
    P, groups = triton.next_power_of_2(pairs), 2 if activation in GATED else 1
    lists = counts = None
    if pairs > SEARCHED:
        lists, counts = indices.new_empty(n_experts, pairs), indices.new_empty(n_experts)
        kernels.list_kernel[(n_experts,)](indices, lists, counts, pairs, P=P, **launch(4, pdl))
        P = 16
    eager = pdl and pairs >= 2 * n_experts  # nearly every expert is chosen then
    hidden = x.new_empty(pairs, f)
    how = _cut(UP, pairs, n_experts, x)
    how = how._replace(columns=max(16, how.columns // groups))
    kernels.up_many_kernel[(triton.cdiv(f, how.columns), n_experts)](
        x, indices, lists, counts, up, biases["up"], hidden, pairs, d, f,
        ACTIVATION=activation, GROUPS=groups, K=top_k, P=P, **_tiles(how, d, eager, up), **launch(how.warps, pdl),
    )  # fmt: skip
    how = _cut(DOWN, pairs, n_experts, x)
    alone = top_k == 1  # each row is written once then
    out = x.new_empty(pairs, d, dtype=x.dtype if alone else torch.float32)
    kernels.down_many_kernel[(triton.cdiv(d, how.columns), n_experts)](
        hidden, indices, lists, counts, gates, down, biases["down"], residual if alone else None, out, pairs, d, f,
        P=P, **_tiles(how, f, eager, down), **launch(how.warps, pdl),
    )  # fmt: skip
    if alone:
        return out
    y, columns = x.new_empty(batch, d), min(512, triton.next_power_of_2(d))
    kernels.sum_kernel[(triton.cdiv(d, columns), batch)](
        out, residual, y, d, K=top_k, C=columns, **launch(4, pdl)
    )  # fmt: skip
    return y


def _tiles(how: Cut, length: int, eager: bool, weight: Tensor) -> dict[str, int]:
    """How kernels of many choices are cut, whose sums are over `length`."""
    tiles = {"ROWS": how.rows, "C": how.columns, "DEPTH": min(how.depth, max(16, triton.next_power_of_2(length)))}
    return tiles | {"STAGES": STAGES, "LINES": _lines(how.columns * length, weight) if eager else 0}


def _cut(cuts: dict[int | None, Cut], pairs: int, n_experts: int, x: Tensor) -> Cut:
    """The entry for the average number of choices of an expert; of wider numbers half as many terms at once."""
    how = next(how for most, how in cuts.items() if most is None or pairs <= most * n_experts)
    return how._replace(depth=how.depth // 2) if x.dtype == torch.float32 else how
