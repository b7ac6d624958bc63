"""Muon for matrices, single or stacked, beside AdamW for all else."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

# Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/), as in torch.optim.Muon: five iterations bring
# every singular value near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2
"""root mean square of an update at learning rate 1, about that of AdamW's (arXiv 2502.16982, section 2.2)"""
TOGETHER = 1 << 24  # elements of the matrices of one shape that take their step as one stack; a larger one is alone


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `"muon": True` take Muon's step instead.

    The momentum of a matrix's gradient is made orthogonal by Newton-Schulz iterations, then scaled by
    `RMS * sqrt(max(rows, columns))`, so that learning rate and weight decay are those of AdamW (arXiv 2502.16982). What
    torch.optim.Muon lacks: parameters (..., rows, columns) are stacks of matrices, each orthogonal by itself, as
    experts are; parameters that are sharded over processes; one optimiser with AdamW's groups; and `found_inf`.

    Attributes, as of fused AdamW:
        found_inf: () float32; where it is 1, a step changes nothing, without the host having to know.
        grad_scale: () float32, which gradients are divided by.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        for group in groups:
            if group.get("muon"):
                for parameters in _alike([each for each in group["params"] if each.grad is not None]):
                    self._step(parameters, group["lr"], group["weight_decay"], keep)
        return loss

    def _step(self, parameters: Sequence[Tensor], rate: Tensor | float, decay: float, keep: Tensor | float) -> None:
        """The step of parameters of one shape. A GPU has little more to do for many small matrices than for one."""
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # AdamW asks for it when state is loaded; Muon has no use for it
        rows, columns = parameters[0].shape[-2:]
        # On local tensors: a shard of the momentum needs no other process.
        weights = [_local(parameter) for parameter in parameters]
        momenta = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momentum, gradient = _stack(momenta), _stack(gradients)
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if isinstance(keep, Tensor):
            gradient = torch.where(keep > 0, gradient, 0.0)  # not finite times 0 would not be 0
        momentum.lerp_(gradient, torch.as_tensor((1 - MOMENTUM) * keep, dtype=momentum.dtype, device=momentum.device))
        if len(momenta) > 1:
            torch._foreach_copy_(momenta, momentum.unbind())
        update = orthogonal_like(gradient.lerp(momentum, MOMENTUM), parameters[0])
        torch._foreach_mul_(weights, 1 - rate * decay * keep)
        torch._foreach_add_(weights, (update * (-rate * RMS * math.sqrt(max(rows, columns)) * keep)).unbind())


def _alike(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape together, up to TOGETHER elements; sharded ones one by one."""
    by_shape: dict[Any, list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        key = number if isinstance(parameter, DTensor) else (parameter.shape, parameter.dtype, parameter.device)
        by_shape.setdefault(key, []).append(parameter)
    for alike in by_shape.values():
        most = max(1, TOGETHER // alike[0].numel())
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(n, ...): a copy, but of one tensor a view."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0][None]


def orthogonal_like(local: Tensor, parameter: Tensor) -> Tensor:
    """`orthogonal` of a stack (n, ...) of what is shaped as a parameter, or (1, ...) of this process's shard of it.

    A shard of whole matrices of a stack, as experts on several processes are, is computed where it is. Other
    shards are gathered, computed by every process, and cut again.
    """
    if not isinstance(parameter, DTensor):
        return orthogonal(local)
    if parameter.ndim > 2 and all(
        placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements
    ):
        return orthogonal(local)
    shards = DTensor.from_local(
        local[0], parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    whole = DTensor.from_local(
        orthogonal(shards.full_tensor()), parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    )
    return whole.redistribute(parameter.device_mesh, parameter.placements).to_local()[None]


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T for every matrix U S V^T of a stack: (..., rows, columns) -> the same, float32.

    Five Newton-Schulz iterations, in bfloat16 on a GPU; singular values end between about 0.7 and 1.2, which serves as
    well as 1 (https://kellerjordan.github.io/posts/muon/).
    """
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices.float()
    x = x.flatten(0, -3) if x.ndim > 2 else x[None]
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-7).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
