"""RMSNorm on the CPU in one pass over each row; PyTorch's own is six operations there. A task is a block of rows."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import address, floats, kernel, located, new, plain, run, summed, traced
from . import reference

ROWS = 32  # rows of a task: the gradient of the weight is summed within it first

_ZERO, _ONE = np.float32(0), np.float32(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `moemamba.ops.rms_norm`."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return reference.rms_norm(x, weight, eps)
    op = _forward if traced(x, weight) else _run_forward
    y, _ = op(plain(x), plain(weight), eps)
    return y


# --- the two kernels ---


@kernel
def _norm(first: int, last: int, count: int, width: int, eps: float, x: int, weight: int, y: int, scale: int) -> None:
    """y = x w s, and s = 1 / sqrt(mean x^2 + eps) of each row."""
    w, scales = floats(weight, (width,)), floats(scale, (count,))
    for row in range(first * ROWS, min(last * ROWS, count)):
        source, target = floats(x + 4 * width * row, (width,)), floats(y + 4 * width * row, (width,))
        total = _ZERO
        for c in range(width):
            total += source[c] * source[c]
        s = _ONE / np.sqrt(total / np.float32(width) + np.float32(eps))
        scales[row] = s
        for c in range(width):
            target[c] = source[c] * s * w[c]


@kernel
def _norm_backward(
    first: int, last: int, count: int, width: int, x: int, weight: int, scale: int, dy: int, dx: int, dweight: int
) -> None:
    """dx, and the gradient of the weight by block of rows."""
    w, scales = floats(weight, (width,)), floats(scale, (count,))
    for block in range(first, last):
        dw = floats(dweight + 4 * width * block, (width,))
        for c in range(width):
            dw[c] = _ZERO
        for row in range(block * ROWS, min((block + 1) * ROWS, count)):
            source, g = floats(x + 4 * width * row, (width,)), floats(dy + 4 * width * row, (width,))
            target, s = floats(dx + 4 * width * row, (width,)), scales[row]
            along = _ZERO  # of the gradient with the row itself
            for c in range(width):
                along += g[c] * w[c] * source[c]
                dw[c] += g[c] * source[c] * s
            along *= s * s / np.float32(width)
            for c in range(width):
                target[c] = s * (g[c] * w[c] - along * source[c])


# --- custom ops: what torch.compile and autograd see ---


def _run_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the scale of each row."""
    width = x.shape[-1]
    count = x.numel() // width
    y, scale = new(*x.shape), new(count)
    places = located(x, weight, y, scale)
    if places is None:
        places = [address(x, *x.shape), address(weight, width), address(y, *x.shape), address(scale, count)]
    run(_norm, -(-count // ROWS), x.numel(), count, width, eps, *places)
    return y, scale


_forward = torch.library.custom_op("moemamba::cpu_rms_norm", _run_forward, mutates_args=())


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])


@torch.library.custom_op("moemamba::cpu_rms_norm_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> list[Tensor]:
    """Gradients of x and weight."""
    count, width = scale.shape[0], x.shape[-1]
    blocks = -(-count // ROWS)
    dx, dweight = new(*x.shape), new(blocks, width)
    inputs = (address(x, *x.shape), address(weight, width), address(scale, count), address(dy, *x.shape))
    places = (*inputs, address(dx, *x.shape), address(dweight, blocks, width))
    run(_norm_backward, blocks, x.numel(), count, width, *places)
    return [dx, summed(dweight)]


@_backward.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    return (*_backward(x, weight, scale, plain(dy)), None)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
