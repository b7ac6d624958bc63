"""Where a layer's parameters lie, and in which dtype, as torch's own modules take it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import nn

from .roles import roles

Arguments = ParamSpec("Arguments")


def placed(build: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Do what a layer's `__init__` says of `device` and `dtype`, for all that is inside of it.

    Everything is made on the device, "meta" included. Of the dtype are all parameters but those that are read in
    float32 whatever the precision (`roles`), which stay float32 at least, as buffers do: routers, dt, A and D. Whole
    numbers and marks, as a router of one's own may have, stay what they are.
    """

    @wraps(build)
    def init(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        given: dict[str, Any] = named  # type: ignore[assignment]  # that they may be there is all a checker knows
        device, dtype = given.get("device"), given.get("dtype")
        with nullcontext() if device is None else torch.device(device):
            build(*arguments, **named)
        if dtype is not None:
            layer: Any = arguments[0]
            cast(layer, dtype)

    return init


def cast(layer: nn.Module, dtype: torch.dtype) -> None:
    """A layer's parameters in a dtype, in place; see `placed`."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; parameters are floating point, such as torch.bfloat16")
    role, wide = roles(layer), torch.promote_types(dtype, torch.float32)
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(wide if role[name].float32 else dtype)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(wide)
