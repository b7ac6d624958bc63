"""RMSNorm on the CPU in one pass over each row; PyTorch's own is six operations there. A task is a block of rows."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..kit.cpu import address, exact_kernel, floats, kernel, located, new, plain, run, summed
from ..kit.cpu.lanes import tile
from ..kit.op import gradient, op
from . import reference

ROWS = 32  # rows of a task: the gradient of the weight is summed within it first

_ZERO, _ONE = np.float32(0), np.float32(1)
_dot = tile(1, 1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `moemamba.ops.rms_norm`."""
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return reference.rms_norm(x, weight, eps)
    y, _ = _forward(plain(x), plain(weight), eps)
    return y


def prepare(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Callable[[int], None] | None:
    """See `moemamba.ops.prepare_rms_norm`."""
    rows, width = x.shape
    tensors = (x, weight, y, new(rows))
    places = located(*tensors)
    if places is None:
        return None

    def step(live: int) -> None:
        assert tensors  # and so are not freed
        run(_norm, -(-live // ROWS), live * width, live, width, eps, *places)

    return step


# --- the two kernels ---


@exact_kernel
def _norm(first: int, last: int, count: int, width: int, eps: float, x: int, weight: int, y: int, scale: int) -> None:
    """y = x w s, and s = 1 / sqrt(mean x^2 + eps) of each row."""
    w, scales = floats(weight, (width,)), floats(scale, (count,))
    for row in range(first * ROWS, min(last * ROWS, count)):
        source, target = floats(x + 4 * width * row, (width,)), floats(y + 4 * width * row, (width,))
        _dot(width, x + 4 * width * row, 0, x + 4 * width * row, 0, scale + 4 * row, 0)
        s = _ONE / np.sqrt(scales[row] / np.float32(width) + np.float32(eps))
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


# --- what torch.compile and autograd see ---


def _like_outputs(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])


@op("cpu_rms_norm", fake=_like_outputs)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the scale of each row."""
    width = x.shape[-1]
    count = x.numel() // width
    y, scale = new(*x.shape), new(count)
    places = located(x, weight, y, scale)
    if places is None:
        places = [address(x, *x.shape), address(weight, width), address(y, *x.shape), address(scale, count)]
    run(_norm, -(-count // ROWS), x.numel(), count, width, eps, *places)
    return y, scale


@gradient(_forward, outputs="y, scale", of="x, weight")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> list[Tensor]:
    count, width = scale.shape[0], x.shape[-1]
    blocks = -(-count // ROWS)
    dy, dx, dweight = plain(dy), new(*x.shape), new(blocks, width)
    inputs = (address(x, *x.shape), address(weight, width), address(scale, count), address(dy, *x.shape))
    places = (*inputs, address(dx, *x.shape), address(dweight, blocks, width))
    run(_norm_backward, blocks, x.numel(), count, width, *places)
    return [dx, summed(dweight)]
