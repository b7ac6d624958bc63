"""The vocabulary head's loss on the GPU: the logits of some thousand tokens at a time, turned into gradients in place.

The gradients are computed with the loss, so the head costs its three products and one pass over each chunk of logits,
and the backward pass only scales them. That pass reads the logits once from memory: the second reading, which
writes the gradient, finds them in the cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOGITS_BYTES = 900 << 20  # of logits that exist at once
ALIGNMENT = 64  # the vocabulary is widened to a multiple of this, without which matrix products are slow


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = _cross_entropy(hidden, weight, targets, ignore_index, gradients)
    if reduction == "mean":
        return total / (targets != ignore_index).sum()  # type: ignore[no-any-return]
    return total  # type: ignore[no-any-return]


@torch.library.custom_op("moemamba::old_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss () float32 and, if wanted, its gradients: dhidden (t, d), and dweight (v, d) float32."""
    tokens, v = hidden.shape[0], weight.shape[0]
    wide = triton.cdiv(v, ALIGNMENT) * ALIGNMENT
    targets = targets.contiguous()
    weight = F.pad(weight.to(hidden.dtype), (0, 0, 0, wide - v))
    chunk = _chunk(tokens, wide * hidden.element_size(), triton.cdiv(hidden.shape[1], 256), _processors(hidden))
    logits = hidden.new_empty(chunk, wide)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden, dweight = _empty_gradients(hidden, wide, gradients)
    dweight.zero_()
    for start in range(0, tokens, chunk):
        h = hidden[start : start + chunk]
        part = torch.mm(h, weight.T, out=logits[: h.shape[0]])
        _softmax[(h.shape[0],)](
            part, targets[start:], losses[start:], v, wide, ignore_index, GRADIENT=gradients, BLOCK=4096, num_warps=16
        )
        if gradients:
            torch.mm(part, weight, out=dhidden[start : start + chunk])
            _add_product(dweight, part.T, h)
    return losses.sum(), dhidden, dweight[:v]


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


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # only CUDA has products of another dtype than their operands'
        total.addmm_(a.float(), b.float())


@triton.jit
def _softmax(logits, targets, losses, v, wide, ignore_index, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A row's loss, and in place of its logits their gradient: softmax minus one-hot; zero where it does not count."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    logits += row.to(tl.int64) * wide
    target = tl.load(targets + row)
    counts = target != ignore_index
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # each lane keeps its own running maximum, and the sum relative to it
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < v, other=float("-inf")).to(tl.float32) * LOG2_E
        rescale = tl.exp2(-tl.abs(x - top))
        total = tl.where(x > top, total * rescale + 1, total + rescale)
        top = tl.maximum(top, x)
    highest = tl.max(top, 0)
    log2_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    tl.store(losses + row, tl.where(counts, log2_sum / LOG2_E - chosen, 0.0))
    if GRADIENT:
        for start in range(0, wide, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < v, other=float("-inf")).to(tl.float32) * LOG2_E
            gradient = tl.exp2(x - log2_sum) - tl.where(start + columns == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=start + columns < wide)
