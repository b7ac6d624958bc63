"""What every op sees to before a backend takes over: shapes, dtype, order in memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .derivatives import transformed
from .kit.packed import Weight


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; torch does not answer for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def exactly(device: str) -> AbstractContextManager[Any]:
    """Without autocast on a kind of device."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def readable(x: Tensor) -> bool:
    """Whether the host may look at values at once: they lie on the CPU, and x is what is computed, not what stands for
    it while something is compiled, exported, mapped or only measured."""
    here = x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)
    return here and not torch.compiler.is_compiling() and not transformed(x)


def autocast(x: Tensor) -> Tensor:
    """Under `torch.autocast` x in its dtype, as `torch.nn.functional.linear` would take it: float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocasts(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def dense(tensor: Tensor | None) -> Tensor | None:
    """The same with its entries next to each other in memory, as kernels read vectors, marks and gates."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def dense_rows(tensor: Tensor) -> Tensor:
    """The same with rows whose entries lie next to each other, as kernels read streams; another is copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def gradients_like(*inputs: Tensor | None) -> list[Tensor]:
    """Room for the gradient of each input, contiguous; empty where there is no such input."""
    like = next(t for t in inputs if t is not None)
    return [like.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]


def sizes(name: str, tensor: Weight, letters: str) -> torch.Size:
    """The shape of an argument, one size for each of these letters ("b, l, i"); a ValueError if it has not as many."""
    if len(tensor.shape) != letters.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({letters})")
    return tensor.shape


def expect(name: str, tensor: Weight | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless an argument, where it is given, has this shape."""
    if tensor is not None and tensor.shape != shape:  # a torch.Size is a tuple; to copy it takes a microsecond
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} from the other arguments")
