"""Routers in plain PyTorch: what they mean."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_float32`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ weight.to(dtype).T


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.route`."""
    probabilities = linear_float32(x, weight).softmax(dim=-1)
    indices = (probabilities + bias).topk(top_k, dim=-1).indices
    return indices, probabilities.gather(1, indices)


def route_with_stats(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.route_with_stats`."""
    tokens, n_experts = logits.shape
    probabilities, log_z = logits.softmax(dim=-1), logits.logsumexp(dim=-1)
    indices = (probabilities + bias).topk(top_k, dim=-1).indices
    load = F.one_hot(indices, n_experts).sum((0, 1)).to(logits.dtype)
    share = load / max(1, tokens * top_k)
    balance_loss = n_experts * (share * probabilities.sum(0) / max(1, tokens)).sum()
    entropy = (log_z - (probabilities * logits).sum(-1)).sum() / max(1, tokens)
    z_loss = log_z.square().sum() / max(1, tokens)
    return indices, probabilities.gather(1, indices), balance_loss, z_loss, load, entropy


def route_with_totals(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moemamba.ops.route_with_totals`."""
    n_experts = weight.shape[0]
    if valid is not None:  # filled, since a product with zero does not make what is not a number vanish
        x = x.masked_fill((valid == 0)[:, None], 0)
    logits = linear_float32(x, weight)
    probabilities, log_z = logits.softmax(dim=-1), logits.logsumexp(dim=-1)
    scores = probabilities + bias
    indices = scores.argmax(-1, keepdim=True) if top_k == 1 else scores.topk(top_k, dim=-1).indices
    gates = probabilities.gather(1, indices)
    count = logits.new_ones(x.shape[0]) if valid is None else valid.to(logits.dtype)
    if valid is not None:
        padding = (valid == 0)[:, None]
        indices, gates = indices.masked_fill(padding, n_experts), gates.masked_fill(padding, 0)

    def total(values: Tensor) -> Tensor:
        """(t, n) -> (g, n)."""
        return (count.view(groups, 1, -1) @ values.view(groups, -1, values.shape[1])).squeeze(1)

    chosen = indices[..., None] == torch.arange(n_experts, device=x.device)  # (t, k, e)
    load = chosen.view(groups, -1, n_experts).sum(1).to(logits.dtype)
    entropy = (log_z - (probabilities * logits).sum(-1)).detach()
    each = (probabilities, log_z.square()[:, None], entropy[:, None])
    probabilities, z, entropy = (total(values) for values in each)
    return indices, gates, load, probabilities, z.squeeze(1), entropy.squeeze(1)
