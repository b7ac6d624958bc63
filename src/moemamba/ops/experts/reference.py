"""Expert products in plain PyTorch: what they mean."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import batched

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
    "relu2": lambda x: F.relu(x).square(),
    "gelu_erf": F.gelu,
    "geglu": lambda x: F.gelu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
}


def activate(x: Tensor, activation: str) -> Tensor:
    """See `moemamba.ops.activate`."""
    return ACTIVATIONS[activation](x)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See `moemamba.ops.grouped_linear`."""
    if batched(counts):
        return _grouped_by_masks(x, weight, counts)
    numbers = [x.shape[0]] + [0] * (len(counts) - 1) if counts.is_meta else counts.tolist()  # meta has shapes alone
    groups = x.split([*numbers, x.shape[0] - sum(numbers)])
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
    x: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """See `moemamba.ops.expert_feedforward`."""

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        hidden = ACTIVATIONS[activation](shifted(grouped_linear(rows, up, counts), up_bias, counts))
        return shifted(grouped_linear(hidden, down, counts), down_bias, counts)

    return dispatch(x, indices, gates, up.shape[0], experts)


def shifted(y: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows sorted by expert, plus their expert's bias (e, f); those of none plus nothing."""
    if bias is None:
        return y
    expert = torch.searchsorted(counts.cumsum(0), torch.arange(y.shape[0], device=y.device), right=True)
    return y + F.pad(bias, (0, 0, 0, 1)).to(y.dtype)[expert]


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


def places_in_queues(queues: Tensor, n_queues: int) -> Tensor:
    """See `moemamba.ops.experts.places_in_queues`."""
    order = queues.argsort(stable=True)
    chosen = queues[order]
    first = torch.searchsorted(chosen, torch.arange(n_queues, device=queues.device))
    place = torch.empty_like(queues)
    place[order] = torch.arange(queues.numel(), device=queues.device) - first[chosen]
    return place
