"""Sparse mixture of experts: a router that chooses, experts that compute (MoE-Mamba, section 3.1; arXiv 2101.03961)."""

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.packing import without_padding
from ..feedforward import FeedForward
from .experts import Experts
from .router import Choice, Router, RouterStats, Routing


class MoE(nn.Module):
    """A mixture-of-experts layer: every token passes through its `top_k` experts, weighed by the router's probability.

    Args:
        d_model: width of the input, d.
        n_experts: e.
        d_expert: hidden width of an expert, f; if None, such that an expert has 6 d_model^2 weights.
        top_k: experts that each token visits.
        activation: "relu", "gelu", "silu" or "swiglu".
        capacity_factor: see `Router`; None never drops.
        n_shared_experts: experts that every token visits besides, computed as one dense layer.
        d_out: width of the output; d_model if None.
    """

    padding_is_zero = False  # True where whoever calls the layer sees to it

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_expert: int | None = None,
        *,
        top_k: int = 1,
        activation: str = "swiglu",
        capacity_factor: float | None = None,
        n_shared_experts: int = 0,
        d_out: int | None = None,
    ):
        super().__init__()
        d_expert = d_expert or (2 if activation == "swiglu" else 3) * d_model
        d_out = d_out or d_model
        self.router = Router(d_model, n_experts, top_k, capacity_factor)
        self.experts = Experts(d_model, n_experts, d_expert, d_out, activation)
        shared = n_shared_experts * d_expert
        self.shared = FeedForward(d_model, shared, activation, d_out=d_out) if shared else None

    def residual_weights(self) -> list[Tensor]:
        """The weights whose products are the layer's output."""
        return [self.experts.down_proj, *([] if self.shared is None else self.shared.residual_weights())]

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """x (b, l, d), seq_idx (b, l) -> y (b, l, d_out), zero where dropped or padding, and what the router did."""
        if not self.padding_is_zero:
            x = without_padding(x, seq_idx)
        routing: Routing = self.router(x, seq_idx)
        y: Tensor = self.experts(x.flatten(0, 1), routing).unflatten(0, x.shape[:2])
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if seq_idx is None else shared.masked_fill(seq_idx[..., None] < 0, 0))
        return y, routing.stats

    def serve(self, x: Tensor) -> Tensor:
        """`forward` in evaluation, without what the router did: for few tokens that costs more than the experts."""
        with torch.autocast(x.device.type, enabled=False):
            router, tokens = self.router, x.flatten(0, 1)
            choice = Choice(*ops.router_choices(tokens, router.weight, router.balance_bias, router.top_k))
        y: Tensor = self.experts(x.flatten(0, 1), choice).unflatten(0, x.shape[:2])
        return y if self.shared is None else y + self.shared(x)
