"""What routers have in common: which experts a token visits, how many an expert takes, and what is said of the balance.

A router scores the experts and chooses some for each token. What follows is the same for all: `settled` keeps to the
capacity and makes the statistics, of one process or several. `route` does it for choices that come from anywhere.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.arguments import exactly, readable, sizes
from ...ops.experts import places_in_queues
from ...ops.packing import expect_numbers
from ...ops.router import Routed

if TYPE_CHECKING:
    from ..parts import Parts


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


class Rules(NamedTuple):
    """How the choices of a batch become a routing."""

    n_experts: int
    top_k: int
    capacity_factor: float | None = None
    """each expert takes floor(capacity_factor * tokens * top_k / n_experts) choices of a group, in order of time"""
    groups: int = 1
    """that the batch is, of equally many consecutive rows"""
    across: dist.ProcessGroup | None = None
    """processes whose batches, one after another, are one group"""
    parts: "Parts | None" = None
    """processes that have later and earlier parts of these sequences; see `layers.parts`"""


def settled(chosen: Routed, batch: int, valid: Tensor | None, rules: Rules, router: nn.Module | None = None) -> Routing:
    """Choices and their sums -> what stays of them, and the statistics.

    Args:
        chosen: of t tokens; it may be made of the same number of choices for each, or of fewer with n_experts in
            place of the others.
        batch: rows, b.
        valid: (t,) 1 for tokens, 0 for padding; None: all are tokens.
        router: that chose.
    Returns:
        the routing; with `rules.parts` its statistics are `Open`.
    """
    indices, gates, own, *totals = chosen
    n_experts, top_k, factor, groups, across, parts = rules
    rows, size = batch // groups, indices.shape[0] // groups
    length = indices.shape[0] // max(1, batch)
    load = own
    tokens = own.new_full((groups,), size) if valid is None else valid.view(groups, size).sum(1)  # (g,)
    earlier, share = None, 1
    if across is not None:
        which = indices[..., None] == torch.arange(n_experts, device=indices.device)  # (t, k, e)
        there = gathered(which.view(batch, length, -1, n_experts).sum((0, 2)), across)  # (processes, l, e)
        earlier, share = _earlier_elsewhere(there, across.rank()), across.size()
        load = there.sum((0, 1))[None].to(own.dtype)
        tokens = gathered(tokens, across).sum(0)
    before = None
    if parts is not None:
        tokens, share = parts.tokens(tokens, groups), parts.size
        before = None if factor is None else parts.earlier(router, own.long())
    dropped = own.new_zeros(groups)
    if factor is not None:
        limit = capacity(factor, tokens.double(), top_k, n_experts)
        place = arrival(indices.view(batch, length, -1), n_experts, groups, earlier, before)
        kept = (place < limit.repeat_interleave(rows)[:, None, None]).flatten(0, 1) & (indices < n_experts)
        indices, gates = indices.masked_fill(~kept, n_experts), gates.masked_fill(~kept, 0)
        dropped = own.sum(1) - kept.view(groups, -1).sum(1)

    # Means over a group's tokens; of several processes this one's share.
    counted = tokens.clamp(min=1)
    probabilities, z, entropy = (share * total.view(groups, -1) / counted[:, None] for total in totals)
    found = Open(probabilities, counted * top_k, z.mean(), own, share * dropped, entropy.mean())
    return Routing(indices, gates, completed(found, load) if parts is None else found)  # type: ignore[arg-type]


class Open(NamedTuple):
    """`RouterStats` before the load of whole groups is known."""

    probabilities: Tensor
    """(g, e) means over a group's tokens, or this process's share of them"""
    visits: Tensor
    """(g,) choices that the tokens of a group have"""
    z_loss: Tensor
    load: Tensor
    """(g, e) of this process"""
    dropped: Tensor
    """(g,) choices, times the processes that a group lies on"""
    entropy: Tensor


def completed(stats: Open, load: Tensor) -> RouterStats:
    """The statistics, of the load (g, e) of whole groups."""
    fraction = load / stats.visits[:, None]
    return RouterStats(
        balance_loss=load.shape[1] * (fraction * stats.probabilities).sum(1).mean(),
        z_loss=stats.z_loss,
        load=stats.load.sum(0),
        dropped=(stats.dropped / load.sum(1).clamp(min=1)).mean(),
        entropy=stats.entropy,
    )


def route(
    indices: Tensor,
    gates: Tensor,
    n_experts: int,
    seq_idx: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    probabilities: Tensor | None = None,
    top_k: int | None = None,
    capacity_factor: float | None = None,
    groups: int = 1,
    across: dist.ProcessGroup | None = None,
    parts: "Parts | None" = None,
    router: nn.Module | None = None,
) -> Routing:
    """Any choices as a routing: within the capacity, without padding, with the statistics of `RouterStats`.

    Args:
        indices: (b, l, k) integers, experts of each token; n_experts where it has fewer than k.
        gates: (b, l, k) their weights.
        n_experts: e.
        seq_idx: (b, l); negative entries are padding, which is not routed.
        logits: (b, l, e) that the choices are made of, for z-loss and probabilities; None where there are none, as of
            a hash: then the losses are 0.
        probabilities: (b, l, e) for the balance loss and the entropy; softmax of the logits if None.
        top_k: choices that a token has on average, which share and capacity are counted by; k if None.
        capacity_factor, groups, across, parts: see `Rules`. A router of one's own passes its attributes on; in
            evaluation nothing is dropped unless this is asked for.
        router: that chose, where there are parts.
    Raises:
        ValueError: a shape that does not fit.
    """
    batch, length, count = sizes("indices", indices, "b, l, k")
    for name, given, shape in (
        ("gates", gates, (batch, length, count)),
        ("logits", logits, (batch, length, n_experts)),
        ("probabilities", probabilities, (batch, length, n_experts)),
    ):
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {shape}")
    if seq_idx is not None:
        expect_numbers(seq_idx, (batch, length))
    _expect_experts(indices, n_experts)
    if batch % groups:
        raise ValueError(f"a batch of {batch} rows cannot be cut into {groups} routing groups; give a multiple")
    dtype = torch.promote_types(gates.dtype, torch.float32)
    valid = None if seq_idx is None else (seq_idx.flatten() >= 0).to(dtype)
    with exactly(gates.device.type):
        chosen = _summed(
            indices.flatten(0, 1).long(), gates.flatten(0, 1).to(dtype), n_experts, valid, groups, logits, probabilities
        )
        rules = Rules(n_experts, count if top_k is None else top_k, capacity_factor, groups, across, parts)
        return settled(chosen, batch, valid, rules, router)


def _expect_experts(indices: Tensor, n_experts: int) -> None:
    """Raise a ValueError for what are no experts; a GPU is not waited for."""
    if indices.dtype == torch.bool or indices.is_floating_point():
        raise ValueError(f"indices is {indices.dtype}; expected integers, experts 0 to {n_experts - 1}")
    if not readable(indices) or not indices.numel():
        return
    low, high = (int(each) for each in indices.aminmax())
    if low < 0 or high > n_experts:
        odd = low if low < 0 else high
        raise ValueError(f"indices has {odd}; experts are 0 to {n_experts - 1}, and {n_experts} stands for none")


def _summed(
    indices: Tensor,
    gates: Tensor,
    n_experts: int,
    valid: Tensor | None,
    groups: int,
    logits: Tensor | None,
    probabilities: Tensor | None,
) -> Routed:
    """What `ops.router` would say of choices (t, k)."""
    if valid is not None:
        indices, gates = indices.masked_fill(valid[:, None] == 0, n_experts), gates.masked_fill(valid[:, None] == 0, 0)
    which = F.one_hot(indices, n_experts + 1)[..., :n_experts].sum(1).to(gates.dtype)  # (t, e)
    load = which.view(groups, -1, n_experts).sum(1).detach()
    count = indices.shape[0]
    if logits is None and probabilities is None:
        zero = gates.new_zeros(count)
        shares, z, entropy = gates.new_zeros(count, n_experts), zero, zero
    else:
        flat = None if logits is None else logits.flatten(0, 1).to(gates.dtype)
        z = gates.new_zeros(count) if flat is None else flat.logsumexp(-1).square()
        made = flat.softmax(-1) if probabilities is None and flat is not None else probabilities
        assert made is not None
        shares = made.reshape(count, n_experts).to(gates.dtype)
        entropy = torch.special.entr(shares.detach()).sum(-1)
    if valid is not None:  # filled, not multiplied by zero: padding may be infinite
        shares, z, entropy = (
            each.masked_fill((valid == 0).view(-1, *[1] * (each.ndim - 1)), 0) for each in (shares, z, entropy)
        )
    sums = [each.view(groups, count // groups, *each.shape[1:]).sum(1) for each in (shares, z, entropy)]
    return Routed(indices, gates, load, *sums)


class BaseRouter(nn.Module):
    """What the rest of the package knows of a router. One's own inherits it and says `forward(x, seq_idx) -> Routing`,
    most easily by `self.routed(indices, gates, seq_idx, logits=logits)`.

    Any other module serves too; then groups, and what training does with several processes, are its own affair.

    Args:
        n_experts: e.
        top_k: choices for each token, k.
        capacity_factor: while training, each expert takes floor(capacity_factor * tokens * top_k / n_experts) choices
            of a routing group, in order of time, and drops later ones. None, and evaluation, never drop.

    Attributes:
        groups: while training, a batch is this many routing groups of equally many consecutive rows; capacity, order
            and statistics are those of a group.
        across: processes whose batches, one after another, make up one group, which then is the only one; None if a
            group lies within a process. Each returns its share of the group's losses times their number, so that the
            mean over processes is the loss.
        parts: processes that have other parts of the same sequences; None where sequences are whole.
    """

    __call__: Callable[..., Routing]

    def __init__(self, n_experts: int, top_k: int = 1, capacity_factor: float | None = None):
        super().__init__()
        self.n_experts, self.top_k, self.capacity_factor = n_experts, top_k, capacity_factor
        self.groups = 1
        self.across: dist.ProcessGroup | None = None
        self.parts: Parts | None = None

    @property
    def rules(self) -> Rules:
        """Those of training while training, else one group without a limit."""
        if not self.training:
            return Rules(self.n_experts, self.top_k)
        return Rules(self.n_experts, self.top_k, self.capacity_factor, self.groups, self.across, self.parts)

    def routed(
        self,
        indices: Tensor,
        gates: Tensor,
        seq_idx: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        probabilities: Tensor | None = None,
    ) -> Routing:
        """`route` by this router's rules."""
        options: dict[str, Any] = self.rules._asdict()
        own = (indices, gates, options.pop("n_experts"), seq_idx)
        return route(*own, logits=logits, probabilities=probabilities, router=self, **options)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model, whatever they are: what its layers hold under that name, by the layer's name."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):  # one router may serve several layers
        place, _, last = name.rpartition(".")
        if last == "router":
            found[place] = module
    return found


def capacity(factor: float, tokens: Tensor, top_k: int, n_experts: int) -> Tensor:
    """Choices that one expert takes: floor(factor * tokens * top_k / n_experts); tokens () float64, exact."""
    return torch.floor(factor * tokens * top_k / n_experts)


def arrival(
    indices: Tensor, n_experts: int, groups: int = 1, earlier: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """How many earlier choices of its group fell on the same expert: a token's place in its expert's queue.

    Earlier means earlier in time, then by row, then by choice, so that no token depends on one that comes later.

    Args:
        indices: (b, l, k) chosen experts; n_experts marks no choice, which queues by itself.
        groups: of equally many consecutive rows, each with queues of its own.
        earlier: (l, e) choices of other processes that come before those made here at each time.
        before: (g, e) choices that come before all of these.
    Returns:
        (b, l, k) int64.
    """
    queues = groups * (n_experts + 1)
    group = torch.arange(groups, device=indices.device).repeat_interleave(indices.shape[0] // groups)
    in_time = (indices + group[:, None, None] * (n_experts + 1)).transpose(0, 1)  # (l, b, k)
    place = places_in_queues(in_time.flatten(), queues)
    if earlier is not None:
        place = place + F.pad(earlier, (0, 1)).gather(1, indices.transpose(0, 1).flatten(1)).flatten()
    if before is not None:
        place = place + F.pad(before, (0, 1)).flatten().gather(0, in_time.flatten())
    return place.view_as(in_time).transpose(0, 1)


def _earlier_elsewhere(counts: Tensor, process: int) -> Tensor:
    """(l, e): of all processes' choices (processes, l, e), those of others that come before this one's at each time."""
    others = counts.sum(0) - counts[process]
    return others.cumsum(0) - others + counts[:process].sum(0)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(processes, ...): x of every process; without gradient."""
    everyone = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(everyone.unbind()), x.contiguous(), group=group)
    return everyone
