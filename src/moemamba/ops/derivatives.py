"""Whether somebody differentiates or maps in a way that kernels know nothing of: torch.func, and forward mode."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*arguments: Any) -> bool:
    """Whether torch.func is at work here, or an argument carries a forward-mode derivative: kernels know of neither."""
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return True
    return forward_ad._current_level >= 0 and any(map(_is_dual, arguments))


def _is_dual(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def batched(tensor: Tensor) -> bool:
    """Whether vmap is at work on a tensor, so that its values cannot decide what is computed."""
    if not torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return False
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
