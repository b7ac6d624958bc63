"""The ops in plain PyTorch: the specification that every kernel is held against, and the fallback where none runs.

Written to be read. Memory stays lean all the same: the scan and the loss walk through chunks whose inner tensors are
recomputed in the backward pass, so nothing of size (b, l, i, n) or (tokens, vocabulary) ever exists as a whole.
Float64 inputs are computed in float64 throughout (for `gradcheck`); everything else accumulates in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .derivatives import batched, transformed
from .packing import boundaries, taps

SCAN_CHUNK = 32  # positions whose (b, chunk, i, n) tensors exist at once
LOSS_CHUNK = 1024  # tokens whose logits exist at once


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, length, width = u.shape
    if initial_state is None:
        state = torch.zeros(batch, width, A.shape[1], dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    valid, starts = None, None
    if seq_idx is not None:
        valid, starts = boundaries(seq_idx)
        u, dt, B, C = (t.masked_fill(~valid[..., None], 0) for t in (u, dt, B, C))
        z = None if z is None else z.masked_fill(~valid[..., None], 0)
    outputs = []
    for chunk in (slice(start, start + SCAN_CHUNK) for start in range(0, length, SCAN_CHUNK)):
        inputs = [None if t is None else t[:, chunk] for t in (u, dt, B, C, z, valid, starts)]
        args = (state, *inputs, A, D, dt_bias, dt_softplus, dtype)
        y, state = _recomputed(_scan_chunk, *args)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(u), state


def _scan_chunk(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    valid: Tensor | None,
    starts: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t + D u_t (Mamba, arXiv 2312.00752, Algorithm 2)."""
    x, step = u.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    if valid is not None:  # a step of length zero changes nothing: decay 1, input 0
        step = step.masked_fill(~valid[..., None], 0)
    decay = torch.exp(step[..., None] * A.to(dtype))  # (b, c, i, n)
    drive = (step * x)[..., None] * B.to(dtype)[:, :, None, :]  # (b, c, i, n)
    states = []
    for t, (a, bx) in enumerate(zip(decay.unbind(1), drive.unbind(1), strict=True)):
        if starts is not None:  # filled, not multiplied by zero: what came before may be infinite
            state = state.masked_fill(starts[:, t, None, None], 0)
        state = torch.addcmul(bx, a, state)
        states.append(state)
    y = torch.einsum("bcin,bcn->bci", torch.stack(states, dim=1), C.to(dtype))
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0)
    return y.to(u.dtype), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.causal_conv1d`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (batch, length, width), taps_count = x.shape, weight.shape[1]
    if initial_state is None:
        history = x.new_zeros(batch, taps_count - 1, width)
    else:
        history = initial_state.to(x.dtype).transpose(1, 2)
    row = torch.cat([history, x], dim=1)  # (b, k - 1 + l, i)
    if seq_idx is None or length == 0:
        windows = [row[:, tap : tap + length] for tap in range(taps_count)]  # oldest first
        final_state = row[:, length:].transpose(1, 2)
    else:
        index, inside = taps(seq_idx, taps_count)
        gathered = [
            row.gather(1, index[..., j, None].expand(-1, -1, width)).masked_fill(~inside[..., j, None], 0)
            for j in reversed(range(taps_count - 1))
        ]
        windows = [g[:, :-1] for g in gathered] + [x.masked_fill(seq_idx[..., None] < 0, 0)]
        final_state = torch.stack([g[:, -1] for g in gathered], dim=-1) if gathered else row[:, :0].transpose(1, 2)
    kernel = weight.to(dtype)
    y = sum((window.to(dtype) * kernel[:, tap] for tap, window in enumerate(windows)), torch.zeros_like(x, dtype=dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    if seq_idx is not None:
        y = y.masked_fill(seq_idx[..., None] < 0, 0)
    return y.to(x.dtype), final_state


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moemamba.ops.mamba_step`."""
    n, h = A_log.shape[1], x
    if norm_weight is not None:
        h = (
            rms_norm(x, norm_weight, eps)
            if norm_bias is None
            else F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        )
    u, z = F.linear(h, in_proj).chunk(2, dim=-1)
    u, conv_after = causal_conv1d(u, conv_weight, conv_bias, "silu", conv_state, None)
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], n, n], dim=-1)
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    dt = F.linear(dt, dt_proj, dt_bias)
    y, ssm_after = selective_scan(u, dt, A, B, C, D, z, None, True, ssm_state, None)
    y = F.linear(y, out_proj)
    if in_place:
        conv_after, ssm_after = conv_state.copy_(conv_after), ssm_state.copy_(ssm_after)
    return y if norm_weight is None else x + y, conv_after, ssm_after


def linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    """See `moemamba.ops.linear_argmax`."""
    return F.linear(x, weight.to(x.dtype)).argmax(dim=-1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
}


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    if batched(counts):
        return _grouped_by_masks(x, weight, counts)
    groups = x.split([*counts.tolist(), x.shape[0] - int(counts.sum())])
    products = [group @ w.to(x.dtype).T for group, w in zip(groups, weight, strict=False)]
    return torch.cat([*products, x.new_zeros(groups[-1].shape[0], weight.shape[1])])


def _grouped_by_masks(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` where the counts are no numbers, as under vmap: every matrix meets every row."""
    ends, place = counts.cumsum(0), torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, matrix in enumerate(weight):
        other = ((place < ends[e] - counts[e]) | (place >= ends[e]))[:, None]
        y = y + (x.masked_fill(other, 0) @ matrix.to(x.dtype).T).masked_fill(other, 0)
    return y


def expert_linear(x: Tensor, indices: Tensor, gates: Tensor | None, weight: Tensor) -> Tensor:
    """See `moemamba.ops.expert_linear`."""
    return dispatch(x, indices, gates, weight.shape[0], lambda rows, counts: grouped_linear(rows, weight, counts))


def expert_feedforward(
    x: Tensor, indices: Tensor, gates: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(ACTIVATIONS[activation](grouped_linear(rows, up, counts)), down, counts)

    return dispatch(x, indices, gates, up.shape[0], experts)


def dispatch(
    x: Tensor, indices: Tensor, gates: Tensor | None, n_experts: int, experts: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sort the (token, choice) pairs by expert, apply the experts, and sum what each token's choices return."""
    if batched(indices):
        return _dispatch_to_all(x, indices, gates, n_experts, experts)
    top_k = indices.shape[1]
    flat = indices.flatten()
    order = flat.argsort(stable=True)  # pairs that no expert takes (index n_experts) come last
    counts = flat.new_zeros(n_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:n_experts]
    token = order // top_k
    y = experts(x.index_select(0, token), counts).to(torch.promote_types(x.dtype, torch.float32))
    if gates is not None:
        shares = gates.flatten().masked_fill(flat == n_experts, 0)  # a dropped choice's may be not a number
        y = y * shares.index_select(0, order)[:, None]
    return y.new_zeros(x.shape[0], y.shape[1]).index_add(0, token, y).to(x.dtype)


def _dispatch_to_all(
    x: Tensor, indices: Tensor, gates: Tensor | None, n_experts: int, experts: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`dispatch` where how many rows an expert gets is no number, as under vmap: each expert computes every token."""
    dtype, rows = torch.promote_types(x.dtype, torch.float32), x.shape[0]
    y: Tensor | None = None
    for e in range(n_experts):
        chosen = indices == e
        share = chosen.to(dtype) if gates is None else gates.masked_fill(~chosen, 0).to(dtype)
        taken = chosen.any(1)[:, None]
        own = experts(x.masked_fill(~taken, 0), _all_of(e, n_experts, rows, x.device)).to(dtype)
        part = (own * share.sum(1)[:, None]).masked_fill(~taken, 0)
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def _all_of(e: int, n_experts: int, rows: int, device: torch.device) -> Tensor:
    """Counts (e,) that give all rows to one expert."""
    return torch.tensor([rows * (e == other) for other in range(n_experts)], device=device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `moemamba.ops.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `moemamba.ops.linear`."""
    return F.linear(x, weight, bias)


def linear_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.linear_beside`."""
    return x, F.linear(x, weight)


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


def places_in_queues(queues: Tensor, n_queues: int) -> Tensor:
    """See `moemamba.ops.places_in_queues`."""
    order = queues.argsort(stable=True)
    chosen = queues[order]
    first = torch.searchsorted(chosen, torch.arange(n_queues, device=queues.device))
    place = torch.empty_like(queues)
    place[order] = torch.arange(queues.numel(), device=queues.device) - first[chosen]
    return place


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `moemamba.ops.linear_cross_entropy`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    hidden = hidden.masked_fill((targets == ignore_index)[:, None], 0)  # be it not a number
    for h, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
        total = total + _recomputed(_summed_loss, h, weight, t, ignore_index, dtype)
    if reduction == "mean":
        return total / (targets != ignore_index).sum()
    return total


def _summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    return F.cross_entropy(logits.to(dtype), targets, ignore_index=ignore_index, reduction="sum")


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; if gradients are wanted, keep its inputs alone and compute it again in the backward pass.

    Not under torch.func or in forward mode, which cannot: memory then grows with the length.
    """
    if not torch.is_grad_enabled() or transformed(*args):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
