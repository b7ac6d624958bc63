"""Whether somebody differentiates or maps in a way that kernels know nothing of: torch.func, and forward mode."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transforms_active = torch._C._are_functorch_transforms_active  # type: ignore[attr-defined]


def may_be_transformed() -> bool:
    """Whether `transformed` has to be asked at all; a matter of nanoseconds."""
    return forward_ad._current_level >= 0 or _transforms_active()  # type: ignore[no-any-return]


def transformed(*arguments: Any) -> bool:
    """Whether torch.func is at work here, or an argument carries a forward-mode derivative: kernels know of neither."""
    if _transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(map(_is_dual, arguments))


def _is_dual(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def batched(tensor: Tensor) -> bool:
    """Whether vmap is at work on a tensor, so that its values cannot decide what is computed."""
    if not _transforms_active():
        return False
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
