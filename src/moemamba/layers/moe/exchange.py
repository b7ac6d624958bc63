"""Expert parallelism: each process of a group holds some of the experts, and the tokens travel to them and back."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...ops.arguments import autocast
from ...ops.kit.packed import Weight

Held = TypeVar("Held", bound=Weight)


def visit_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    n_experts: int,
    group: dist.ProcessGroup,
    compute: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`y = sum_j gates_j E[indices_j](x)` where process p of the group holds the p-th equal share of the experts.

    Two exchanges with uneven splits, there and back, each the other's backward pass. A process that receives no token
    computes one row of zeros that no expert takes, so that its experts have a gradient all the same: zero.

    Args:
        x: (t, d) this process's tokens.
        indices: (t, k) int64, of all n_experts; n_experts where a choice was dropped.
        gates: (t, k) float32 weight of each choice; one if None.
        compute: rows (r, d) and which expert of this process takes each (r, 1) -> (r, o).
    Returns:
        (t, o) in the dtype of the products; zero for a token whose every choice was dropped.
    """
    x = autocast(x)  # as the products would, but before the journey
    own = n_experts // group.size()
    order = indices.flatten().argsort(stable=True)
    experts = torch.arange(n_experts, device=x.device)
    leaving = (indices.flatten()[:, None] == experts).sum(0)  # (e,) by expert
    arriving = torch.empty_like(leaving)
    dist.all_to_all_single(arriving, leaving, group=group)  # (e,) by source, then own expert
    totals = torch.stack([leaving, arriving]).view(2, group.size(), own).sum(-1).tolist()
    sent, received = totals[0], totals[1]

    order = order[: sum(sent)]  # what nobody takes comes last
    rows = _exchange(x[order // indices.shape[1]], received, sent, group)
    place = torch.arange(own, device=x.device).repeat(group.size()).repeat_interleave(arriving, output_size=len(rows))
    if not len(rows):
        rows, place = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), place.new_full((1,), own)
    y = _exchange(compute(rows, place[:, None])[: sum(received)], sent, received, group)

    choices = y.new_zeros(indices.numel(), y.shape[1]).index_copy(0, order, y).view(*indices.shape, -1)
    if gates is None:
        return choices.sum(1)
    return (choices.to(gates.dtype) * gates[..., None]).sum(1).to(y.dtype)


def held(weight: Held) -> Held:
    """The experts that this process holds of a stack of matrices."""
    return weight.to_local() if isinstance(weight, DTensor) else weight  # type: ignore[return-value]


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    return _Exchange.apply(rows, received, sent, group)  # type: ignore[no-any-return,no-untyped-call]


class _Exchange(torch.autograd.Function):
    """torch's all-to-all with its gradient, which is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = ctx.splits
        result = gradient.new_empty(sum(received), gradient.shape[1])
        dist.all_to_all_single(result, gradient.contiguous(), received, sent, group=ctx.group)
        return result, None, None, None
