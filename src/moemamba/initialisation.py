"""The weights that a model begins with."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import final_norm, roles
from .layers.head import Head
from .layers.residual import Residual

if TYPE_CHECKING:
    from .model import MoEMamba


def overwrite(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter."""
    with torch.no_grad():
        parameter.copy_(values)


def initialise(model: "MoEMamba", fill: Callable[[Tensor, Tensor], None] = overwrite) -> None:
    """Draw the weights again as `config.init` says, from torch's global generator.

    Both leave the Mamba layers' own parameters as the layer draws them (mamba_ssm's initialisation), but "default"
    divides what writes into the residual stream by the square root of its depth (as GPT-2 and mamba_ssm's models do).
    "paper" is that of MoE-Mamba's authors: truncated normal of variance 0.1 / fan_in, cut at +-0.2, where the fan-in of
    the experts' second matrix counts all experts.

    Args:
        fill: puts drawn values, which are on the CPU, into a parameter.
    """
    if model.config.init == "paper":
        role = roles(model)
        for name, weight in model.named_parameters(remove_duplicate=False):
            if fan_in := role[name].fan_in:
                values = torch.empty(weight.shape)
                fill(weight, nn.init.trunc_normal_(values, std=math.sqrt(0.1 / fan_in), a=-0.2, b=0.2))
        return
    for table in (model.embedding.weight, model.head.weight):
        fill(table, nn.init.normal_(torch.empty(table.shape), std=0.02))
    with torch.no_grad():
        for layer in model.layers:
            role = roles(layer)
            for name, parameter in layer.named_parameters():
                if role[name].writes_residual:
                    parameter.div_(math.sqrt(len(model.layers)))


def draw(model: "MoEMamba", fill: Callable[[Tensor, Tensor], None], seed: int) -> None:
    """Give a model that was built on the meta device the weights that `MoEMamba(config)` has, a sub-layer at a time.

    Args:
        fill: puts values, which are on the CPU, into a parameter or buffer, which may be sharded.
        seed: the weights are those after `torch.manual_seed(seed)`; torch's global generators stay as they are.
    """
    with torch.device("cpu"), _Drawing(torch.Generator("cpu").manual_seed(seed)):
        _draw(model, fill)


class _Drawing(TorchFunctionMode):
    """Draw from this generator, in this thread, what would come from torch's global one."""

    FUNCTIONS = frozenset(
        {
            Tensor.normal_,
            Tensor.uniform_,
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.trunc_normal_,
            nn.init.kaiming_uniform_,
        }
    )

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FUNCTIONS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def _draw(model: "MoEMamba", fill: Callable[[Tensor, Tensor], None]) -> None:
    config = model.config
    makers: list[tuple[nn.Module, Callable[[], nn.Module]]] = [
        (model.embedding, lambda: nn.Embedding(config.vocab_size, config.d_model)),
        *(
            (layer, partial(Residual, own, letters))
            for layer, (letters, own) in zip(model.layers, config.sublayers(), strict=True)
        ),
        (model.norm, lambda: final_norm(config)),
        (model.head, lambda: Head(config.d_model, config.vocab_size, bias=config.head_bias)),
    ]
    for module, make in makers:
        values = make().state_dict()
        for name, tensor in module.state_dict(keep_vars=True).items():
            fill(tensor, values[name])
    drawn: set[int] = set()

    def fill_once(parameter: Tensor, values: Tensor) -> None:
        """A tied head is drawn too, but the embedding's values stay."""
        if id(parameter) not in drawn:
            fill(parameter, values)
        drawn.add(id(parameter))

    initialise(model, fill_once)
