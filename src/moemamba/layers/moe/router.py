"""Routers: which experts a token visits, and what that says about the balance."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops.arguments import sizes
from ...ops.experts import places_in_queues
from ..roles import VECTOR, Role


class RouterStats(NamedTuple):
    """What one router did with a batch: means over its routing groups. Returned, never stored; only the losses carry
    gradients."""

    balance_loss: Tensor
    """() n_experts * sum_e (share of choices) (mean probability): 1 when balanced (arXiv 2101.03961, eq. 4); the
    probabilities of sigmoid gates are their shares of a token's sum over all experts (arXiv 2412.19437, eq. 19)"""
    z_loss: Tensor
    """() mean squared log-sum-exp of the logits (arXiv 2202.08906, eq. 5)"""
    load: Tensor
    """(e,) float32 choices that fell on each expert, before any is dropped"""
    dropped: Tensor
    """() share of the choices that found their expert full"""
    entropy: Tensor
    """() mean entropy of a token's probabilities, in nats; log(n_experts) at most"""

    def loss(self, balance_weight: float = 0.01, z_weight: float = 0.001) -> Tensor:
        """() what a training loop of your own adds to its loss for this router, with the default weights of a model.

        Without the first part a router soon sends most tokens to few experts. `Output.auxiliary` is the mean of this
        over a model's routers, with the weights of its configuration.
        """
        return balance_weight * self.balance_loss + z_weight * self.z_loss


class Choice(NamedTuple):
    """Which experts each of t tokens visits."""

    indices: Tensor
    """(t, k) int64"""
    gates: Tensor
    """(t, k) float32 weight of each choice: its probability, or its sigmoid"""


class Routing(NamedTuple):
    """Which experts each token visits; t counts the positions of the batch, row after row."""

    indices: Tensor
    """(t, k) int64; n_experts where a choice was dropped, and at padding"""
    gates: Tensor
    """(t, k) float32 weight of each choice; 0 where dropped"""
    stats: RouterStats


def note(record: list[Choice] | None, routing: Routing, x: Tensor) -> None:
    """Append what was chosen for x (b, l, d) to a record, if there is one, as (b, l, k)."""
    if record is not None:
        record.append(Choice(*(part.detach().unflatten(0, x.shape[:2]) for part in routing[:2])))


class Router(nn.Module):
    """Top-k router, in float32 whatever the surrounding precision.

    Args:
        d_model: width of the tokens, d.
        n_experts: e.
        top_k: choices for each token, k.
        capacity_factor: while training, each expert takes floor(capacity_factor * tokens * top_k / n_experts) choices
            of a routing group, in order of time, and drops later ones. None, and evaluation, never drop.
        scores: what the gates are: "softmax" of the logits over all experts, or the "sigmoid" of each.
        bias: whether each expert's logit has a learned bias.

    Attributes:
        groups: while training, a batch is this many routing groups of equally many consecutive rows; capacity, order
            and statistics are those of a group.
        across: processes whose batches, one after another, make up one group, which then is the only one; None if a
            group lies within a process. Each returns its share of the group's losses times their number, so that the
            mean over processes is the loss.
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
        super().__init__()
        self.scores = scores
        self.n_experts, self.top_k, self.capacity_factor = n_experts, top_k, capacity_factor
        self.groups = 1
        self.across: dist.ProcessGroup | None = None
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
        batch, length, _ = sizes("x", x, "b, l, d")
        if (
            not self.training
            and seq_idx is None
            and ops.choose("router_means", x, self.balance_bias, self.top_k, self.scores) != "reference"
            and not torch.is_grad_enabled()
        ):
            with torch.autocast(x.device.type, enabled=False):
                return self._route_all(x)
        groups, across = (self.groups, self.across) if self.training else (1, None)
        if batch % groups:
            raise ValueError(f"a batch of {batch} rows cannot be cut into {groups} routing groups; give a multiple")
        rows, size = batch // groups, batch // groups * length
        valid = None if seq_idx is None else (seq_idx.flatten() >= 0).to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            indices, gates, own, *totals = ops.router(
                x.flatten(0, 1),
                self.weight,
                self.balance_bias,
                self.top_k,
                valid,
                groups,
                logit_bias=self.bias,
                scores=self.scores,
            )
            load = own
            tokens = own.new_full((groups,), size) if valid is None else valid.view(groups, size).sum(1)  # (g,)
            earlier, share = None, 1
            if across is not None:
                chosen = indices[..., None] == torch.arange(self.n_experts, device=x.device)  # (t, k, e)
                there = _gather(
                    chosen.view(batch, length, self.top_k, self.n_experts).sum((0, 2)), across
                )  # (processes, l, e)
                earlier, share = _earlier_elsewhere(there, across.rank()), across.size()
                load = there.sum((0, 1))[None].to(own.dtype)
                tokens = _gather(tokens, across).sum(0)
            dropped = own.new_zeros(())
            if self.training and self.capacity_factor is not None:
                limit = capacity(self.capacity_factor, tokens.double(), self.top_k, self.n_experts)
                place = arrival(indices.view(batch, length, self.top_k), self.n_experts, groups, earlier)
                kept = (place < limit.repeat_interleave(rows)[:, None, None]).flatten(0, 1) & (indices < self.n_experts)
                indices, gates = indices.masked_fill(~kept, self.n_experts), gates.masked_fill(~kept, 0)
                lost = own.sum(1) - kept.view(groups, size * self.top_k).sum(1)
                dropped = (share * lost / load.sum(1).clamp(min=1)).mean()

            # Means over a group's tokens; of several processes this one's share.
            counted = tokens.clamp(min=1)
            probabilities, z, entropy = (share * total.view(groups, -1) / counted[:, None] for total in totals)
            fraction = load / (counted * self.top_k)[:, None]
            stats = RouterStats(
                balance_loss=self.n_experts * (fraction * probabilities).sum(1).mean(),
                z_loss=z.mean(),
                load=own.sum(0),
                dropped=dropped,
                entropy=entropy.mean(),
            )
            return Routing(indices, gates, stats)

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


def capacity(factor: float, tokens: Tensor, top_k: int, n_experts: int) -> Tensor:
    """Choices that one expert takes: floor(factor * tokens * top_k / n_experts); tokens () float64, exact."""
    return torch.floor(factor * tokens * top_k / n_experts)


def arrival(indices: Tensor, n_experts: int, groups: int = 1, earlier: Tensor | None = None) -> Tensor:
    """How many earlier choices of its group fell on the same expert: a token's place in its expert's queue.

    Earlier means earlier in time, then by row, then by choice, so that no token depends on one that comes later.

    Args:
        indices: (b, l, k) chosen experts; n_experts marks no choice, which queues by itself.
        groups: of equally many consecutive rows, each with queues of its own.
        earlier: (l, e) choices of other processes that come before those made here at each time.
    Returns:
        (b, l, k) int64.
    """
    queues = groups * (n_experts + 1)
    group = torch.arange(groups, device=indices.device).repeat_interleave(indices.shape[0] // groups)
    in_time = (indices + group[:, None, None] * (n_experts + 1)).transpose(0, 1)  # (l, b, k)
    place = places_in_queues(in_time.flatten(), queues)
    if earlier is not None:
        place = place + F.pad(earlier, (0, 1)).gather(1, indices.transpose(0, 1).flatten(1)).flatten()
    return place.view_as(in_time).transpose(0, 1)


def _earlier_elsewhere(counts: Tensor, process: int) -> Tensor:
    """(l, e): of all processes' choices (processes, l, e), those of others that come before this one's at each time."""
    others = counts.sum(0) - counts[process]
    return others.cumsum(0) - others + counts[:process].sum(0)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, ...): x of every process; without gradient."""
    everyone = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(everyone.unbind()), x.contiguous(), group=group)
    return everyone
