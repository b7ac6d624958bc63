"""A model over several processes, on PyTorch's own engines.

Where every process has all of the model it stays as it is, and DistributedDataParallel sums its gradients while the
backward pass goes on. Where parameters are shared out (FSDP2) or experts spread, parameters are DTensors; inside
`forward` they are plain tensors, but for spread experts (`layers.exchange.held`).

Gradients are summed, never averaged: each process's loss is its share of the global one.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from ..layers import BaseRouter, roles, routers
from ..layers.moe.experts import Experts, LinearExperts
from ..model import MoEMamba
from .processes import Processes


def shard(model: MoEMamba, processes: Processes, dtype: torch.dtype, copies: bool, expert_parallel: int) -> None:
    """Replace a model's parameters by this process's parts of them.

    With bfloat16 activations, the matrices that products cast to bfloat16 anyway travel in it; master weights and
    gradients' sums are float32, and so are routers, norms, embedding, convolutions and what the scan reads.

    Args:
        dtype: of the activations.
        copies: each process has all parameters but those of spread experts; else they are shared out.
        expert_parallel: processes that the experts of a layer are spread over; divides their number.
    """
    size, kind, parallel = processes.size, processes.device.type, expert_parallel
    mesh = processes.limit(_mesh(kind, size, 1, copies))
    expert_mesh = processes.limit(_mesh(kind, size // parallel, parallel, copies))
    options: dict[str, Any] = {"reshard_after_forward": not copies}
    exact = options | {"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    cast = options | {"mp_policy": narrow} if dtype != torch.float32 else exact
    own: set[nn.Parameter] = set()
    for layer in model.layers:
        experts: list[nn.Module] = [module for module in layer.modules() if isinstance(module, Experts | LinearExperts)]
        alone: set[nn.Parameter] = set()  # of this process and no other, so that there is nothing to sum
        if parallel > 1 and experts:
            for module in experts:
                _spread(module, expert_mesh["expert"])
            if size > parallel:
                fully_shard(experts, mesh=_data(expert_mesh), **cast)
            else:
                alone = {parameter for module in experts for parameter in module.parameters()}
        elif dtype != torch.float32 and experts:
            fully_shard(experts, mesh=_data(mesh), **cast)
        matrices = [module for module in narrow_modules(layer) if module not in experts]
        if dtype != torch.float32 and matrices:
            fully_shard(matrices, mesh=_data(mesh), **cast)
        fully_shard(layer, mesh=_data(mesh), ignored_params=alone, **exact)
        own |= alone
    if not model.config.tie_embeddings:
        fully_shard(model.head, mesh=_data(mesh), **cast)
    fully_shard(model, mesh=_data(mesh), ignored_params=own, **exact)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo cannot scale on the way


def narrow_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a sub-layer that have parameters, none of which is read in float32 whatever the precision."""
    role, found = roles(layer), []
    for prefix, module in layer.named_modules():
        own = [f"{prefix}.{name}".removeprefix(".") for name, _ in module.named_parameters(recurse=False)]
        if own and not any(role[name].float32 for name in own):
            found.append(module)
    return found


def _mesh(kind: str, data: int, parallel: int, copies: bool) -> DeviceMesh:
    """All processes: neighbours share experts, the rest copies or shards."""
    shape = (data, 1, parallel) if copies else (1, data, parallel)
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard", "expert"))


def _data(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP works over: copies of shards, or shards alone."""
    return mesh["copy", "shard"] if mesh["shard"].size() == 1 else mesh["shard"]


def _spread(module: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(module, Experts | LinearExperts)
    for name, parameter in list(module.named_parameters()):
        own = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(own))
    module.group = mesh.get_group()


def group_routers(model: MoEMamba, groups: int, processes: Processes, parts: int = 1) -> None:
    """Tell the routers their groups, `groups` in a part of the batch of all processes.

    Args:
        parts: processes that share a row.
    """
    across = None
    if parts > 1:
        groups *= parts  # each of which is on all of them
    elif groups < processes.size:
        mesh = init_device_mesh(
            processes.device.type, (groups, processes.size // groups), mesh_dim_names=("group", "member")
        )
        across = processes.limit(mesh)["member"].get_group()
    for module in routers(model).values():
        if isinstance(module, BaseRouter):
            module.groups, module.across = max(1, groups // processes.size), across


def sharded(model: nn.Module) -> bool:
    """Whether a process holds only parts of some parameters, or copies that FSDP2 keeps alike."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refresh(model: nn.Module) -> None:
    """After parameters were changed in place between steps: forget whole ones that were put together before."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def summing(model: MoEMamba, processes: Processes) -> nn.Module:
    """What computes the forward pass of training, so that the backward pass sums gradients over the processes."""
    if not processes.distributed or sharded(model):
        return model
    replica = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # they are alike already
    replica.register_comm_hook(None, _sum)
    return replica


# torch insists on these annotations, though its stubs lack one of the names
def _sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    summed = dist.all_reduce(bucket.buffer(), async_op=True)
    assert summed is not None
    return summed.get_future().then(lambda done: done.value()[0])


def last_part(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Copies exchange their gradients with the last part of a batch alone; shards are summed with each."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], processes: Processes) -> Tensor:
    """The gradient's norm over all parameters of all processes, () float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):  # alike everywhere
        return nn.utils.get_total_norm(gradients)
    parts = list(zip(torch._foreach_norm([own_part(gradient) for gradient in gradients]), gradients, strict=True))
    squares = torch.stack([part.square() / _copies(gradient) for part, gradient in parts]).sum()
    return processes.sum([squares])[0].sqrt()


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
    """Divide the gradient by `scale`, () float32, which all processes have alike."""
    torch._foreach_div_([own_part(parameter.grad) for parameter in parameters if parameter.grad is not None], scale)


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def own_part(tensor: Tensor) -> Tensor:
    """This process's part, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """A tensor put together from all its parts; every process calls this."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dimension in range(len(placements)):  # one after another: experts were shared out first, so they come last
        placements[dimension] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@torch.no_grad()
def fill(tensor: Tensor, source: Any) -> None:
    """Copy this process's part out of a whole: a tensor, or a slice of a safetensors file, of which no more is read."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(source[...] if isinstance(source, Tensor) or tensor.ndim == 0 else source[:])
        return
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if local.numel():
        local.copy_(source[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))])
