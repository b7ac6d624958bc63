"""Sort the choices of a routed layer by expert, on the GPU and without asking it anything.

A *pair* is one choice of one token, `token * k + choice`. A *row* is a pair's place once pairs are sorted by expert,
each expert beginning at a whole tile; the rows that fill up an expert's last tile belong to no pair. So a tile of rows
meets one expert's matrix. The tables have room for the worst case, and only the device knows what is in use of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kit.op import op

BLOCK = 64  # pairs that one program ranks against each other


class Order(NamedTuple):
    """The pairs sorted by expert."""

    pairs: Tensor
    """(r,) int32 pair of each row, -1 where a tile is filled up; undefined beyond the tiles in use"""
    experts: Tensor
    """(r / tile,) int32 expert of each tile in use; n_experts for those of the dropped pairs, which come last"""
    bounds: Tensor
    """(2 (e + 1) + 1,) int32 first and last-plus-one row of each expert and of the dropped, then the rows in use"""


def sort_by_expert(indices: Tensor, n_experts: int, tile: int) -> Order:
    """Counting sort of the pairs, stable. indices: (t, k), n_experts where dropped; tile: rows of a tile."""
    n_pairs, n_groups = indices.numel(), n_experts + 1
    blocks = max(1, triton.cdiv(n_pairs, BLOCK))
    n_tiles = n_pairs // tile + n_groups  # no more, however the pairs fall
    counts, pairs, experts, bounds = (
        torch.empty(size, dtype=torch.int32, device=indices.device)
        for size in (n_groups * blocks, n_tiles * tile, n_tiles, 2 * n_groups + 1)
    )
    groups = {"n_groups": n_groups, "GROUPS": triton.next_power_of_2(n_groups)}
    flat = indices.flatten()
    _count[(blocks,)](flat, counts, n_pairs, blocks, **groups, BLOCK=BLOCK)
    ends = counts.cumsum(0, dtype=torch.int32)
    _lay_out[(n_groups,)](ends, bounds, experts, pairs, blocks, **groups, TILE=tile)
    _place[(blocks,)](flat, counts, ends, bounds, pairs, n_pairs, blocks, BLOCK=BLOCK)
    return Order(pairs, experts, bounds)


def places_in_queues(queues: Tensor, n_queues: int) -> Tensor:
    """See `moemamba.ops.places_in_queues`."""
    return _places(queues, n_queues)


@op("places_in_queues", fake=lambda queues, n_queues: queues.new_empty(queues.shape))
def _places(queues: Tensor, n_queues: int) -> Tensor:
    n_pairs = queues.shape[0]
    blocks = max(1, triton.cdiv(n_pairs, BLOCK))
    counts = torch.empty(n_queues * blocks, dtype=torch.int32, device=queues.device)
    queues = queues.contiguous()
    _count[(blocks,)](queues, counts, n_pairs, blocks, n_queues, GROUPS=triton.next_power_of_2(n_queues), BLOCK=BLOCK)
    place = torch.empty_like(queues)
    _place[(blocks,)](queues, counts, counts.cumsum(0, dtype=torch.int32), None, place, n_pairs, blocks, BLOCK=BLOCK)
    return place


@triton.jit
def _count(indices, counts, n_pairs, blocks, n_groups, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[group, block]: pairs of this block that chose the group's expert."""
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.load(indices + pairs, mask=pairs < n_pairs, other=0).to(tl.int32)
    groups = tl.arange(0, GROUPS)
    found = tl.histogram(experts, GROUPS, mask=pairs < n_pairs)
    tl.store(counts + groups * blocks + block, found, mask=groups < n_groups)


@triton.jit
def _lay_out(ends, bounds, tile_experts, order, blocks, n_groups, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """One program a group: give it whole tiles, and mark the rows at its end that no pair will fill."""
    group = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    last = tl.load(ends + (groups + 1) * blocks - 1, mask=groups < n_groups, other=0)
    first = tl.load(ends + groups * blocks - 1, mask=(groups > 0) & (groups < n_groups), other=0)
    tiles = tl.cdiv(last - first, TILE)
    begin = tl.sum(tl.where(groups < group, tiles, 0), 0)
    end = tl.sum(tl.where(groups <= group, tiles, 0), 0)
    last_row = begin * TILE + tl.sum(tl.where(groups == group, last - first, 0), 0)
    tl.store(bounds + 2 * group, begin * TILE)
    tl.store(bounds + 2 * group + 1, last_row)
    tl.store(bounds + 2 * n_groups, tl.sum(tiles, 0) * TILE, mask=group == 0)
    for start in range(begin, end, 128):
        tile = start + tl.arange(0, 128)
        tl.store(tile_experts + tile, tl.zeros_like(tile) + group, mask=tile < end)
    row = last_row + tl.arange(0, TILE)
    tl.store(order + row, tl.zeros_like(row) - 1, mask=row < end * TILE)


@triton.jit
def _place(indices, counts, ends, bounds, order, n_pairs, blocks, BLOCK: tl.constexpr):
    """order[row] = pair: behind the pairs of the same expert in earlier blocks, and those before it in this one.

    Without bounds order[pair] = how many those are.
    """
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    pairs = block * BLOCK + place
    real = pairs < n_pairs
    expert = tl.load(indices + pairs, mask=real, other=0).to(tl.int32)
    same = expert[:, None] == expert[None, :]
    rank = tl.sum((same & (place[:, None] > place[None, :])).to(tl.int32), 1)
    cell = expert * blocks + block
    before = tl.load(ends + cell, mask=real, other=0) - tl.load(counts + cell, mask=real, other=0)
    before -= tl.load(ends + expert * blocks - 1, mask=real & (expert > 0), other=0)
    if bounds is None:
        tl.store(order + pairs, (before + rank).to(order.dtype.element_ty), mask=real)
    else:
        row = tl.load(bounds + 2 * expert, mask=real, other=0) + before + rank
        tl.store(order + row, pairs, mask=real)
