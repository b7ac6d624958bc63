"""The router of the paper and its relatives: top k of a linear score."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.arguments import exactly, sizes
from ..roles import VECTOR, Role
from .routing import BaseRouter, RouterStats, Routing, settled


class Router(BaseRouter):
    """Top-k router, in float32 whatever the surrounding precision.

    Args:
        d_model: width of the tokens, d.
        n_experts, top_k, capacity_factor: see `BaseRouter`, which has the attributes too.
        scores: what the gates are: "softmax" of the logits over all experts, or the "sigmoid" of each.
        bias: whether each expert's logit has a learned bias.
    """

    balance_bias: Tensor
    __call__: Callable[..., Routing]
    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 1,
        capacity_factor: float | None = None,
        scores: str = "softmax",
        bias: bool = False,
    ):
        super().__init__(n_experts, top_k, capacity_factor)
        self.scores = scores
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)
        self.register_parameter("bias", nn.Parameter(torch.zeros(n_experts)) if bias else None)
        # Added to the gates when choosing, never to the gates: loss-free balancing (arXiv 2408.15664).
        self.register_buffer("balance_bias", torch.zeros(n_experts))

    def roles(self) -> dict[str, Role]:
        """Its rows stand for experts, one by one."""
        found = {"weight": Role(muon=False, float32=True, fan_in=self.weight.shape[1])}
        return found if self.bias is None else found | {"bias": VECTOR}

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Routing:
        """x (b, l, d), seq_idx (b, l) whose negative entries are not routed -> Routing."""
        batch, _, _ = sizes("x", x, "b, l, d")
        if (
            not self.training
            and seq_idx is None
            and ops.choose("router_means", x, self.balance_bias, self.top_k, self.scores) != "reference"
            and not torch.is_grad_enabled()
        ):
            with exactly(x.device.type):
                return self._route_all(x)
        rules = self.rules
        if batch % rules.groups:
            raise ValueError(
                f"a batch of {batch} rows cannot be cut into {rules.groups} routing groups; give a multiple"
            )
        valid = None if seq_idx is None else (seq_idx.flatten() >= 0).to(torch.promote_types(x.dtype, torch.float32))
        with exactly(x.device.type):
            chosen = ops.router(
                x.flatten(0, 1),
                self.weight,
                self.balance_bias,
                self.top_k,
                valid,
                rules.groups,
                logit_bias=self.bias,
                scores=self.scores,
            )
            return settled(chosen, batch, valid, rules, self)

    def _route_all(self, x: Tensor) -> Routing:
        """As `forward` where nothing is dropped, padded or differentiated, by one kernel: for a token of generation the
        statistics would otherwise cost more than its experts."""
        indices, gates, balance_loss, z_loss, load, entropy = ops.router_means(
            x.flatten(0, 1), self.weight, self.balance_bias, self.top_k, logit_bias=self.bias, scores=self.scores
        )
        stats = RouterStats(balance_loss, z_loss, load, dropped=entropy.new_zeros(()), entropy=entropy)
        return Routing(indices, gates, stats)

    @torch.no_grad()
    def update_balance_bias(self, load: Tensor, rate: float) -> None:
        """Move each expert's selection bias by `rate` against the sign of its excess load (e,)."""
        self.balance_bias += rate * torch.sign(load.mean() - load)
