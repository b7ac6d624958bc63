"""Work that is done again in the backward pass instead of being kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..derivatives import transformed


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; if gradients are wanted, keep its inputs alone and compute it again in the backward pass.

    Not under torch.func or in forward mode, which cannot: memory then grows with the length.
    """
    if not torch.is_grad_enabled() or transformed(*args):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
