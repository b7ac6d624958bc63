"""Routers in plain PyTorch: what they mean."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import exactly


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.router.linear_float32`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with exactly(x.device.type):
        return x.to(dtype) @ weight.to(dtype).T


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, logit_bias: Tensor | None = None, scores: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.router_choices`."""
    each = _scores(logits(x, weight, logit_bias), scores)
    indices = (each + bias).topk(top_k, dim=-1).indices
    return indices, each.gather(1, indices)


def route_with_stats(
    logits: Tensor, bias: Tensor, top_k: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.router.route_with_stats`."""
    tokens, n_experts = logits.shape
    each, log_z = _scores(logits, scores), logits.logsumexp(dim=-1)
    indices = (each + bias).topk(top_k, dim=-1).indices
    load = F.one_hot(indices, n_experts).sum((0, 1)).to(logits.dtype)
    share = load / max(1, tokens * top_k)
    probabilities = _shares(each, scores)
    balance_loss = n_experts * (share * probabilities.sum(0) / max(1, tokens)).sum()
    entropy = _entropy(probabilities, logits, log_z, scores).sum() / max(1, tokens)
    z_loss = log_z.square().sum() / max(1, tokens)
    return indices, each.gather(1, indices), balance_loss, z_loss, load, entropy


def route_with_totals(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    valid: Tensor | None,
    groups: int,
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.router`."""
    n_experts = weight.shape[0]
    if valid is not None:  # filled, since a product with zero does not make what is not a number vanish
        x = x.masked_fill((valid == 0)[:, None], 0)
    own = logits(x, weight, logit_bias)
    each, log_z = _scores(own, scores), own.logsumexp(dim=-1)
    choosing = each + bias
    indices = choosing.argmax(-1, keepdim=True) if top_k == 1 else choosing.topk(top_k, dim=-1).indices
    gates = each.gather(1, indices)
    count = own.new_ones(x.shape[0]) if valid is None else valid.to(own.dtype)
    if valid is not None:
        padding = (valid == 0)[:, None]
        indices, gates = indices.masked_fill(padding, n_experts), gates.masked_fill(padding, 0)

    def total(values: Tensor) -> Tensor:
        """(t, n) -> (g, n)."""
        return (count.view(groups, 1, -1) @ values.view(groups, -1, values.shape[1])).squeeze(1)

    chosen = indices[..., None] == torch.arange(n_experts, device=x.device)  # (t, k, e)
    load = chosen.view(groups, -1, n_experts).sum(1).to(own.dtype)
    probabilities = _shares(each, scores)
    entropy = _entropy(probabilities, own, log_z, scores).detach()
    sums = (probabilities, log_z.square()[:, None], entropy[:, None])
    probabilities, z, entropy = (total(values) for values in sums)
    return indices, gates, load, probabilities, z.squeeze(1), entropy.squeeze(1)


def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_float32`, plus a bias (e,)."""
    found = linear_float32(x, weight)
    return found if bias is None else found + bias.to(found.dtype)


def _scores(logits: Tensor, scores: str) -> Tensor:
    return logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()


def _shares(each: Tensor, scores: str) -> Tensor:
    """A token's scores as probabilities, for the balance loss."""
    return each if scores == "softmax" else each / each.sum(-1, keepdim=True).clamp(min=1e-20)


def _entropy(probabilities: Tensor, logits: Tensor, log_z: Tensor, scores: str) -> Tensor:
    """(t,) in nats."""
    if scores == "softmax":
        return log_z - (probabilities * logits).sum(-1)
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
