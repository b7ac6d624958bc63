"""LoRA (arXiv 2106.09685): small matrices beside large ones, which are added to them in the end.

As parametrisations: a layer reads `weight + scale * B A` where it read its weight, so that every projection and every
stack of experts can have one, and whatever computes with them stays as it is. The sum is made once a step, which costs
little where a step has many tokens.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers.quantised import expect_full

MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj", "qkv_proj", "up_proj", "down_proj", "conv_proj", "gate_proj")
"""modules, or stacks of matrices in a module of experts, that get small ones"""


class Small(nn.Module):
    """`weight (..., o, d) + scale * B (..., o, r) A (..., r, d)`; B begins as zero."""

    def __init__(self, weight: Tensor, rank: int, scale: float, order: list[str]):
        super().__init__()
        self.order = order
        """of the parameters of the module that it is in, which whoever reads its weights relies on"""
        *stack, rows, columns = weight.shape
        self.scale = scale
        self.A = nn.Parameter(torch.empty(*stack, rank, columns, device=weight.device, dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device, dtype=weight.dtype))
        nn.init.uniform_(self.A, -1 / math.sqrt(columns), 1 / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A)


def attach(model: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Give a model small matrices, and let nothing else move.

    Args:
        alpha: the scale is alpha / rank; 2 * rank if None.
    Returns:
        the parameters that are to be trained.
    """
    expect_full(model)
    model.requires_grad_(False)
    found: list[nn.Parameter] = []
    places = [(module, name, list(module._parameters)) for module, name in matrices(model)]
    for module, name, order in places:
        small = Small(getattr(module, name), rank, (alpha or 2 * rank) / rank, order)
        parametrize.register_parametrization(module, name, small)
        found += small.parameters()
    return found


def merge(model: nn.Module) -> None:
    """Add the small matrices to the large ones, and leave the model as it was built."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        own: Any = module.parametrizations
        names = list(own)
        order = own[names[0]][0].order
        for name in names:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        module._parameters = {name: module._parameters[name] for name in order}
    model.requires_grad_(True)


def matrices(model: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    """The modules that have a matrix of `MATRICES`, and its name there: a projection's weight or a stack of experts."""
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            last = place.rpartition(".")[2]
            if (name == "weight" and last in MATRICES and parameter.ndim >= 2) or (name in MATRICES):
                yield module, name
