"""Sparse mixture of experts: a router that chooses, experts that compute (MoE-Mamba, section 3.1; arXiv 2101.03961)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .feedforward import FeedForward


class RouterStats(NamedTuple):
    """What one router did with a batch. Returned, never stored; only the losses carry gradients."""

    balance_loss: Tensor
    """() n_experts * sum_e (share of choices) (mean probability): 1 when balanced (arXiv 2101.03961, eq. 4)"""
    z_loss: Tensor
    """() mean squared log-sum-exp of the logits (arXiv 2202.08906, eq. 5)"""
    load: Tensor
    """(e,) float32 choices that fell on each expert, before any is dropped"""
    dropped: Tensor
    """() share of the choices that found their expert full"""
    entropy: Tensor
    """() mean entropy of a token's probabilities, in nats; log(n_experts) at most"""


class Routing(NamedTuple):
    """Which experts each token visits; t counts the positions of the batch, row after row."""

    indices: Tensor
    """(t, k) int64; n_experts where a choice was dropped, and at padding"""
    gates: Tensor
    """(t, k) float32 probability of each choice; 0 where dropped"""
    stats: RouterStats


class Router(nn.Module):
    """Softmax top-k router, in float32 whatever the surrounding precision.

    Args:
        d_model: width of the tokens, d.
        n_experts: e.
        top_k: choices for each token, k.
        capacity_factor: while training, each expert takes floor(capacity_factor * tokens * top_k / n_experts) choices,
            in order of time across the batch, and drops later ones. None, and evaluation, never drop.
    """

    balance_bias: Tensor

    def __init__(self, d_model: int, n_experts: int, top_k: int = 1, capacity_factor: float | None = None):
        super().__init__()
        self.n_experts, self.top_k, self.capacity_factor = n_experts, top_k, capacity_factor
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)
        # Added to the probabilities when choosing, never to the gates: loss-free balancing (arXiv 2408.15664).
        self.register_buffer("balance_bias", torch.zeros(n_experts))

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Routing:
        """x (b, l, d), seq_idx (b, l) whose negative entries are not routed -> Routing."""
        batch, length, _ = x.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = ops.linear_float32(x.flatten(0, 1), self.weight)  # (t, e)
            probabilities = logits.softmax(dim=-1)
            scores = probabilities + self.balance_bias
            indices = scores.argmax(-1, keepdim=True) if self.top_k == 1 else scores.topk(self.top_k, dim=-1).indices
            gates = probabilities.gather(1, indices)
            valid = logits.new_ones(batch * length) if seq_idx is None else (seq_idx.flatten() >= 0).to(logits.dtype)
            tokens = valid.sum().clamp(min=1)
            if seq_idx is not None:
                indices = indices.masked_fill(valid[:, None] == 0, self.n_experts)

            experts = torch.arange(self.n_experts, device=x.device)
            load = (indices[..., None] == experts).sum(dim=(0, 1)).to(logits.dtype)
            kept = indices < self.n_experts
            if self.training and self.capacity_factor is not None:
                limit = capacity(self.capacity_factor, valid.double().sum(), self.top_k, self.n_experts)
                kept = kept & (arrival(indices.view(batch, length, -1), self.n_experts).flatten(0, 1) < limit)

            log_z = logits.logsumexp(dim=-1)
            stats = RouterStats(
                balance_loss=self.n_experts * (load / (tokens * self.top_k)) @ ((valid @ probabilities) / tokens),
                z_loss=(valid @ log_z.square()) / tokens,
                load=load,
                dropped=1 - kept.sum() / load.sum().clamp(min=1),
                entropy=(valid @ (log_z - (probabilities * logits).sum(-1)).detach()) / tokens,
            )
            return Routing(indices.masked_fill(~kept, self.n_experts), gates.masked_fill(~kept, 0), stats)

    @torch.no_grad()
    def update_balance_bias(self, load: Tensor, rate: float) -> None:
        """Move each expert's selection bias by `rate` against the sign of its excess load (e,)."""
        self.balance_bias += rate * torch.sign(load.mean() - load)


def capacity(factor: float, tokens: Tensor, top_k: int, n_experts: int) -> Tensor:
    """Choices that one expert takes: floor(factor * tokens * top_k / n_experts); tokens () float64, exact."""
    return torch.floor(factor * tokens * top_k / n_experts)


def arrival(indices: Tensor, n_experts: int) -> Tensor:
    """How many earlier choices of the batch fell on the same expert: a token's place in its expert's queue.

    Earlier means earlier in time, then by row, then by choice, so that no token depends on one that comes later.

    Args:
        indices: (b, l, k) chosen experts; n_experts marks no choice, which queues by itself.
    Returns:
        (b, l, k) int64.
    """
    in_time = indices.transpose(0, 1)  # (l, b, k)
    flat = in_time.flatten()
    order = flat.argsort(stable=True)
    chosen = flat[order]
    first = torch.searchsorted(chosen, torch.arange(n_experts + 1, device=flat.device))
    place = torch.empty_like(flat)
    place[order] = torch.arange(flat.numel(), device=flat.device) - first[chosen]
    return place.view_as(in_time).transpose(0, 1)


class Experts(nn.Module):
    """Two-layer feed-forward experts without biases, as stacked matrices.

    Parameters: up_proj (e, f, d), or (e, 2f, d) with the gate's rows first for "swiglu"; down_proj (e, d_out, f).
    """

    def __init__(self, d_model: int, n_experts: int, d_expert: int, d_out: int, activation: str):
        super().__init__()
        self.activation = activation
        rows = 2 * d_expert if activation == "swiglu" else d_expert
        self.up_proj = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_out, d_expert))
        nn.init.uniform_(self.up_proj, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model))
        nn.init.uniform_(self.down_proj, -1 / math.sqrt(d_expert), 1 / math.sqrt(d_expert))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (t, d) -> (t, d_out)."""
        return ops.expert_feedforward(
            x, routing.indices, routing.gates, self.up_proj, self.down_proj, activation=self.activation
        )


class LinearExperts(nn.Module):
    """One matrix an expert: `weight` (e, d_out, d)."""

    def __init__(self, d_model: int, n_experts: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_model))
        nn.init.uniform_(self.weight, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model))

    def forward(self, x: Tensor, routing: Routing, gated: bool) -> Tensor:
        """x (b, l, d) -> (b, l, d_out): the sum of the chosen experts, each weighed by its gate if `gated`."""
        y = ops.expert_linear(x.flatten(0, 1), routing.indices, routing.gates if gated else None, self.weight)
        return y.unflatten(0, x.shape[:2])


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

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """x (b, l, d), seq_idx (b, l) -> y (b, l, d_out), zero where dropped or padding, and what the router did."""
        routing: Routing = self.router(x, seq_idx)
        y: Tensor = self.experts(x.flatten(0, 1), routing).unflatten(0, x.shape[:2])
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if seq_idx is None else shared.masked_fill(seq_idx[..., None] < 0, 0))
        return y, routing.stats
