"""The vocabulary head's loss on the GPU: the logits of some thousand tokens at a time, turned into gradients in place.

The gradients are computed with the loss, so the head costs its three products and one pass over each chunk of logits,
and the backward pass only scales them. That pass reads the logits once from memory: the second reading, which
writes the gradient, finds them in the cache.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_cross_entropy_kernels as kernels
from .triton_experts import _blocks

LOGITS_BYTES = 900 << 20  # of logits that exist at once
ALIGNMENT = 64  # the vocabulary is widened to a multiple of this, without which matrix products are slow
RECOMPUTED = 128  # up to this d_model the logits are computed twice instead of being stored
LARGEST_SUM = 2.0**100


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    programs: int = 1
    parts: int = 2
    flat: bool = True


SCORES = {
    "a": Tiles(128, 256, 64, 3, 8),
    "b": Tiles(128, 256, 64, 4, 8),
    "c": Tiles(128, 128, 64, 3, 4, 2),
    "d": Tiles(128, 128, 64, 4, 8),
    "e": Tiles(128, 128, 64, 3, 8, 2),
    "f": Tiles(64, 256, 64, 2, 4, 2),
    "g": Tiles(256, 128, 64, 3, 8),
    "a0": Tiles(128, 256, 64, 3, 8, 10**6),
    "c0": Tiles(128, 128, 64, 3, 4, 10**6),
    "e0": Tiles(128, 128, 64, 3, 8, 10**6),
    "h": Tiles(128, 256, 128, 2, 8),
    "i": Tiles(128, 256, 64, 3, 8, 1, 1),
    "j": Tiles(128, 128, 32, 5, 4, 2, 1),
    "k": Tiles(128, 128, 64, 2, 4, 2, 1),
    "l": Tiles(128, 128, 64, 2, 8, 2, 1),
    "m": Tiles(128, 256, 64, 3, 8, 1, 2, False),
    "n": Tiles(128, 256, 64, 3, 8, 1, 1, False),
    "float32": Tiles(64, 64, 32, 3, 4),
}
ATTENTION = {
    "a": Tiles(128, 128, 0, 3, 8),
    "b": Tiles(128, 64, 0, 4, 8),
    "c": Tiles(64, 128, 0, 2, 4),
    "d": Tiles(64, 64, 0, 3, 4),
    "e": Tiles(128, 64, 0, 2, 8),
    "f": Tiles(128, 128, 0, 2, 8),
    "h": Tiles(64, 128, 0, 3, 4),
    "i": Tiles(64, 64, 0, 4, 4),
    "j": Tiles(64, 64, 0, 2, 4),
    "float32": Tiles(64, 32, 0, 2, 4),
}
CHOICE = {"score": "a", "attention": "a", "weight": "a"}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = _cross_entropy(hidden, weight, targets, ignore_index, gradients)
    if reduction == "mean":
        return total / (targets != ignore_index).sum()  # type: ignore[no-any-return]
    return total  # type: ignore[no-any-return]


@torch.library.custom_op("moemamba::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss () float32 and, if wanted, its gradients: dhidden (t, d), and dweight (v, d) float32."""
    tokens, d = hidden.shape
    v, dtype = weight.shape[0], hidden.dtype
    recompute = d <= RECOMPUTED
    if dtype == torch.float16 and not recompute:
        dtype = torch.float32  # float16 has too short a range for what has not been divided by its sum
    depth = _wide(d, dtype)
    h = _widen(hidden, tokens, depth, dtype)
    w = _widen(weight, triton.cdiv(v, ALIGNMENT) * ALIGNMENT, depth, dtype)
    targets = targets.contiguous()
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden, dweight = _empty_gradients(h, w.shape[0], gradients)
    if tokens == 0:
        dweight.zero_()
    elif recompute:
        _recompute(h, w, v, targets, ignore_index, gradients, losses, dhidden, dweight)
    else:
        _store(h, w, v, targets, ignore_index, gradients, losses, dhidden, dweight)
    if gradients:
        dhidden, dweight = dhidden[:, :d].to(hidden.dtype).contiguous(), dweight[:v, :d].contiguous()
    return losses.sum(), dhidden, dweight


def _recompute(
    h: Tensor,
    w: Tensor,
    v: int,
    targets: Tensor,
    ignore_index: int,
    gradients: bool,
    losses: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
) -> None:
    """Few columns: the logits are computed twice, and never leave the registers."""
    tokens, depth = h.shape
    log_sums = torch.empty_like(losses)
    how = ATTENTION["float32" if h.dtype == torch.float32 else CHOICE["attention"]]
    deep = max(16, triton.next_power_of_2(depth))
    kernels.hidden_gradient[(triton.cdiv(tokens, how.rows),)](
        _blocks(h, how.rows, deep), _blocks(w[:v], how.columns, deep), w, targets, losses, log_sums, dhidden,
        tokens, v, depth, ignore_index, GRADIENT=gradients,
        ROWS=how.rows, COLUMNS=how.columns, DEPTH=deep, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if gradients:
        how = ATTENTION["float32" if h.dtype == torch.float32 else CHOICE["weight"]]
        kernels.weight_gradient[(triton.cdiv(v, how.rows),)](
            _blocks(h, how.columns, deep), _blocks(w[:v], how.rows, deep), targets, log_sums, dweight, tokens, v, depth,
            ROWS=how.columns, COLUMNS=how.rows, DEPTH=deep, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip


def _store(
    h: Tensor,
    w: Tensor,
    v: int,
    targets: Tensor,
    ignore_index: int,
    gradients: bool,
    losses: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
) -> None:
    """Many columns: the scores of some thousand tokens are stored, and two products read them."""
    tokens, depth = h.shape
    wide, how = w.shape[0], SCORES["float32" if h.dtype == torch.float32 else CHOICE["score"]]
    reference, inverse = torch.empty_like(losses), torch.empty_like(losses)
    kernels.refer[(triton.cdiv(tokens, 8),)](
        h, w, targets, reference, tokens, depth, ignore_index, ROWS=8, DEPTH=min(512, triton.next_power_of_2(depth))
    )
    chunk = _chunk(tokens, wide * h.element_size(), triton.cdiv(depth, 256), _processors(h))
    scores = h.new_empty(chunk if gradients else 0, wide)
    scaled = h.new_empty(chunk if gradients else 0, depth)
    pieces = triton.cdiv(wide, 8192) if CHOICE["score"].startswith("cublas") else triton.cdiv(v, how.columns)
    sums = h.new_empty(pieces, chunk, dtype=torch.float32)
    for start in range(0, tokens, chunk):
        part = h[start : start + chunk]
        rows = part.shape[0]
        if CHOICE["score"].startswith("cublas"):
            step = int(CHOICE["score"][6:] or chunk)
            for at in range(0, rows, step):
                piece = part[at : at + step]
                out = torch.mm(piece, w.T, out=scores[at : at + piece.shape[0]])
                kernels.exponentiate[(piece.shape[0], pieces)](
                    out, reference[start + at :], sums.view(-1)[at:], rows, v, wide, BLOCK=8192, num_warps=8
                )
        else:
            tiles = triton.cdiv(rows, how.rows) * pieces
            kernels.score[(min(tiles, how.programs * _processors(h)),)](
                _blocks(part, how.rows, how.depth), _blocks(w, how.columns, how.depth),
                _blocks(scores[:rows], how.rows, how.columns // how.parts) if gradients else None,
                reference[start:], sums, rows, v, depth, STORE=gradients, PARTS=how.parts, FLAT=how.flat,
                ROWS=how.rows, COLUMNS=how.columns, DEPTH=how.depth, num_warps=how.warps, num_stages=how.stages,
            )  # fmt: skip
        kernels.finish[(triton.cdiv(rows, 32),)](
            part, w, scores, reference[start:], sums, targets[start:], losses[start:], inverse[start:], scaled,
            pieces, rows, v, wide, depth, LARGEST_SUM, GRADIENT=gradients, ROWS=32, COLUMNS=64, DEPTH=64,
        )  # fmt: skip
        if gradients:
            torch.mm(scores[:rows], w, out=dhidden[start : start + chunk])
            _add_product(dweight, scores[:rows].T, scaled[:rows], start == 0)
    if gradients:
        kernels.divide[(triton.cdiv(tokens, 8),)](dhidden, inverse, tokens, depth, ROWS=8, DEPTH=min(512, triton.next_power_of_2(depth)))


@_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight = _empty_gradients(hidden, weight.shape[0], gradients)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


def _empty_gradients(hidden: Tensor, v: int, wanted: bool) -> tuple[Tensor, Tensor]:
    tokens, d = hidden.shape if wanted else (0, 0)
    return hidden.new_empty(tokens, d), hidden.new_empty(v if wanted else 0, d, dtype=torch.float32)


def _chunk(tokens: int, row_bytes: int, columns: int, processors: int) -> int:
    """Tokens whose logits exist at once: an even share, in whole tiles of a product.

    The gradient of the hidden states is a product of few tiles (128 rows by 256 columns), each of which takes as long
    as the vocabulary is wide. So of the possible numbers of chunks this is the one that leaves the fewest processors
    idle: at 65,536 tokens and d_model 512, seven chunks of 148 tiles would take 132 processors as long as fourteen of
    132.
    """
    fewest = triton.cdiv(tokens * row_bytes, LOGITS_BYTES)
    if fewest <= 1:
        return max(tokens, 1)
    rows = {n: triton.cdiv(triton.cdiv(tokens, n), 128) for n in range(fewest, 2 * fewest + 1)}
    best = min(rows, key=lambda n: n * triton.cdiv(rows[n] * columns, processors))
    return rows[best] * 128


def _wide(d: int, dtype: torch.dtype) -> int:
    """Columns of a row that tensor descriptors accept: whole blocks of 16 bytes."""
    return triton.cdiv(d * dtype.itemsize, 16) * 16 // dtype.itemsize


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    return (dhidden * grad).to(dhidden.dtype), (dweight * grad).to(ctx.dtype), None, None, None


_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, where total is float32, and what it holds counts for nothing if this is the first product."""
    if not a.is_cuda or a.dtype == torch.float32:  # only CUDA has products of another dtype than their operands'
        total.addmm_(a.float(), b.float(), beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _widen(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """x in this dtype, with zeros to the right of it and below."""
    if x.shape == (rows, columns) and x.dtype == dtype:
        return x.contiguous()
    wide = x.new_empty(rows, columns, dtype=dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    wide[x.shape[0] :] = 0
    wide[:, x.shape[1] :] = 0
    return wide
