"""The vocabulary head's loss on the GPU, with its gradients: the backward pass only scales them.

Of a wide model the scores of some thousand tokens at a time are stored: one product makes them, two read them, and
nothing else does. A score is 2^(logit - the target's logit), not yet divided by the sum of its row, which is known
only after the product; the division is made where it is cheap, in the (t, d) tensors. Of a narrow model (d_model up to
`RECOMPUTED`) storing would take longer than computing, so the logits are computed once for each gradient and never
leave the registers, as in attention.
"""

import torch
import triton
from torch import Tensor

from ..kit.op import op, wants_grad
from ..kit.triton import Tiles, aligned, blocks, multiprocessors
from ..kit.triton import wide as whole_blocks
from . import triton_kernels as kernels
from .gradients import scales_gradients

RECOMPUTED = 128  # d_model up to which logits are computed anew
MANY_WORDS = 6_000  # from here on the vocabulary keeps a GPU busy with what is computed anew, a block of it a program
SCORES_BYTES = 900 << 20  # of scores that exist at once
ALIGNMENT = 64  # the vocabulary is widened to a multiple of this, without which matrix products are slow
LARGEST_SUM = 2.0**100  # of a row's scores; beyond it some may be infinite

SCORES = {  # the product's tiles
    "hopper": Tiles(rows=128, columns=128, depth=64, stages=3, warps=4),  # two programs a multiprocessor
    "ampere": Tiles(rows=128, columns=128, depth=32, stages=3, warps=8),
    "float32": Tiles(rows=64, columns=64, depth=32, stages=3, warps=4),
}
RECOMPUTED_SCORES = {  # "rows" of what a program keeps, "columns" of what it walks through
    "hopper": Tiles(rows=64, columns=128, depth=128, stages=2, warps=4),
    "hopper, narrow": Tiles(rows=64, columns=64, depth=64, stages=3, warps=4),
    "ampere": Tiles(rows=64, columns=64, depth=128, stages=2, warps=4),
    "float32": Tiles(rows=64, columns=32, depth=128, stages=2, warps=4),
}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    total, _, _ = _cross_entropy(hidden, weight, targets, ignore_index, wants_grad(hidden, weight))
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def choose_tiles(x: Tensor) -> str:
    """The entry of SCORES and RECOMPUTED_SCORES; Hopper's need more shared memory than other GPUs have."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return "float32"
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_multiprocessor
    return "hopper" if shared >= 228 << 10 else "ampere"


def _like_outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight = _empty_gradients(hidden, weight.shape[0], gradients)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


@op("linear_cross_entropy", fake=_like_outputs)
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss () float32 and, if wanted, its gradients: dhidden (t, d), and dweight (v, d) float32."""
    (tokens, d), v = hidden.shape, weight.shape[0]
    recompute = d <= RECOMPUTED and v >= MANY_WORDS
    # float16 has too short a range for a score that is stored
    h = hidden.float() if hidden.dtype == torch.float16 and not recompute else hidden
    wide = triton.cdiv(v, ALIGNMENT) * ALIGNMENT, whole_blocks(d, h)
    h, w = _widen(h, (tokens, wide[1]), h.dtype), _widen(weight, wide, h.dtype)
    losses = h.new_empty(tokens, dtype=torch.float32)
    dhidden, dweight = _empty_gradients(h, w.shape[0], gradients)
    if tokens == 0:
        dweight.zero_()
    else:
        way = _recompute if recompute else _store
        way(h, w, v, targets.contiguous(), ignore_index, losses, (dhidden, dweight) if gradients else ())
    if gradients:
        dhidden, dweight = dhidden[:, :d].to(hidden.dtype).contiguous(), dweight[:v, :d].contiguous()
    return losses.sum(), dhidden, dweight


def _empty_gradients(hidden: Tensor, v: int, wanted: bool) -> tuple[Tensor, Tensor]:
    tokens, d = hidden.shape if wanted else (0, 0)
    return hidden.new_empty(tokens, d), hidden.new_empty(v if wanted else 0, d, dtype=torch.float32)


def _recompute(
    h: Tensor,
    w: Tensor,
    v: int,
    targets: Tensor,
    ignore_index: int,
    losses: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Fill losses (t,), and dhidden and dweight if they are there; scores stay in registers."""
    (tokens, d), name, log_sums = h.shape, choose_tiles(h), torch.empty_like(losses)
    dhidden, dweight = gradients or (None, None)
    depth = max(16, triton.next_power_of_2(d))
    tiles = RECOMPUTED_SCORES["hopper, narrow" if name == "hopper" and depth <= 64 else name]
    options = {"DEPTH": depth, "num_warps": tiles.warps, "num_stages": tiles.stages}
    kernels.hidden_gradient[(triton.cdiv(tokens, tiles.rows),)](
        blocks(h, tiles.rows, depth), blocks(w, tiles.columns, depth), w, targets, losses, log_sums, dhidden,
        tokens, v, d, ignore_index, ROWS=tiles.rows, COLUMNS=tiles.columns, **options,
    )  # fmt: skip
    if gradients:
        kernels.weight_gradient[(triton.cdiv(v, tiles.rows),)](
            blocks(h, tiles.columns, depth), blocks(w, tiles.rows, depth), targets, log_sums, dweight,
            tokens, v, d, ROWS=tiles.columns, COLUMNS=tiles.rows, **options,
        )  # fmt: skip


def _store(
    h: Tensor,
    w: Tensor,
    v: int,
    targets: Tensor,
    ignore_index: int,
    losses: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Fill losses (t,), and dhidden and dweight if they are there; the scores of some thousand tokens are stored."""
    (tokens, d), wide, tiles = h.shape, w.shape[0], SCORES[choose_tiles(h)]
    chunk = _chunk(tokens, wide * h.element_size(), triton.cdiv(d, 256), _processors(h))
    across, block = triton.cdiv(v, tiles.columns), {"ROWS": 8, "COLUMNS": min(512, triton.next_power_of_2(d))}
    reference, inverse = torch.empty_like(losses), torch.empty_like(losses)
    sums = h.new_empty(across, chunk, dtype=torch.float32)
    scores, scaled = (h.new_empty(chunk if gradients else 0, width) for width in (wide, d))
    kernels.refer[(triton.cdiv(tokens, 8),)](h, w, targets, reference, tokens, d, ignore_index, **block)
    for start in range(0, tokens, chunk):
        part = h[start : start + chunk]
        rows = part.shape[0]
        kernels.score[(min(2 * _processors(h), triton.cdiv(rows, tiles.rows) * across),)](
            blocks(part, tiles.rows, tiles.depth), blocks(w, tiles.columns, tiles.depth),
            blocks(scores[:rows], tiles.rows, tiles.columns // 2) if gradients else None,
            reference[start:], sums, rows, v, d,
            ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        kernels.finish[(triton.cdiv(rows, 32),)](
            part, w, scores if gradients else None, reference[start:], sums, targets[start:], losses[start:],
            inverse[start:], scaled, across, rows, v, wide, d, ignore_index, LARGEST_SUM, ROWS=32, COLUMNS=64, DEPTH=64,
        )  # fmt: skip
        if gradients:
            torch.mm(scores[:rows], w, out=gradients[0][start : start + chunk])
            _add_product(gradients[1], scores[:rows].T, scaled[:rows], first=start == 0)
    if gradients:
        kernels.divide[(triton.cdiv(tokens, 8),)](gradients[0], inverse, tokens, d, **block)


def _chunk(tokens: int, row_bytes: int, columns: int, processors: int) -> int:
    """Tokens whose scores exist at once: an even share, in whole tiles of a product.

    The gradient of the hidden states is a product of few tiles (128 rows by 256 columns), each of which takes as long
    as the vocabulary is wide. So of the possible numbers of chunks this is the one that leaves the fewest processors
    idle: at 65,536 tokens and d_model 512, seven chunks of 148 tiles would take 132 processors as long as fourteen of
    132.
    """
    fewest = triton.cdiv(tokens * row_bytes, SCORES_BYTES)
    if fewest <= 1:
        return tokens
    rows = {n: triton.cdiv(triton.cdiv(tokens, n), 128) for n in range(fewest, 2 * fewest + 1)}
    best = min(rows, key=lambda n: n * triton.cdiv(rows[n] * columns, processors))
    return rows[best] * 128


def _processors(x: Tensor) -> int:
    return multiprocessors(x.device) if x.is_cuda else 1


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, where total is float32, and what it holds counts for nothing if this is the first product."""
    if not a.is_cuda or a.dtype == torch.float32:  # only CUDA has products of another dtype than their operands'
        total.addmm_(a.float(), b.float(), beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _widen(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """x in this shape and dtype, with zeros to the right of it and below."""
    if x.shape == shape and x.dtype == dtype:
        return aligned(x)
    wide = x.new_empty(shape, dtype=dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    wide[x.shape[0] :] = 0
    wide[:, x.shape[1] :] = 0
    return wide


scales_gradients(_cross_entropy)
