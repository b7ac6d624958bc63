"""The routers' part of training where somebody else owns the loop: their losses, and balancing by a bias."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...config import ExpertsConfig
from ...layers import RouterStats, routers
from ...model import weighed


def auxiliary(router: tuple[RouterStats, ...], routers: tuple[ExpertsConfig, ...]) -> Tensor:
    """() the routers' losses, weighed as `MoEMamba` does."""
    return weighed(router, routers, router[0].balance_loss)


class _Carrying(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.like)


def carrying(hidden: Tensor, loss: Tensor) -> Tensor:
    """hidden itself; whoever goes backward through it goes backward through a loss () as well.

    So the loss is minimised too where a trainer makes its own of hidden states or logits, and knows of no other.
    """
    return _Carrying.apply(hidden, loss)  # type: ignore[no-any-return,no-untyped-call]


class Collected:
    """The loads of a model's routers since the last step, for `BalanceBias`, if there is one."""

    def __init__(self) -> None:
        self.wanted, self._warned = False, False
        self.loads: list[Tensor] = []

    def note(self, router: tuple[RouterStats, ...], routers: tuple[ExpertsConfig, ...]) -> None:
        """Add those of a forward pass."""
        if not any(experts.bias_rate for experts in routers):
            return
        if not self.wanted:
            if not self._warned:
                warnings.warn(
                    "bias_rate balances the experts after each step, of which this model knows nothing in another "
                    "trainer; give it callbacks=[moemamba.integrations.transformers.BalanceBias()], or set bias_rate "
                    "to 0",
                    stacklevel=3,
                )
            self._warned = True
            return
        new = [stats.load.detach() for stats in router]
        self.loads = new if not self.loads else [old + load for old, load in zip(self.loads, new, strict=True)]


class BalanceBias(TrainerCallback):  # type: ignore[misc]
    """Loss-free balancing (arXiv 2408.15664) under transformers' Trainer and TRL's, where `bias_rate` is not 0.

    Trainer(model, args, ..., callbacks=[BalanceBias()])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """From now on loads are collected."""
        for found in _collecting(model):
            found.collected.wanted = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Move each router's bias against its load since the last step."""
        for found in _collecting(model):
            own = routers(found).values()
            loads, found.collected.loads = found.collected.loads, []
            for router, load, experts in zip(own, loads, found.routers, strict=False):
                if experts.bias_rate:
                    router.update_balance_bias(load, experts.bias_rate)  # type: ignore[operator]

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """No longer."""
        for found in _collecting(model):
            found.collected.wanted = False


def _collecting(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "collected", None), Collected)]
