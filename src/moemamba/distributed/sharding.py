"""A model over several processes, on PyTorch's own engines.

Where every process has all of the model it stays as it is, and DistributedDataParallel sums its gradients while the
backward pass goes on. Where parameters are shared out (FSDP2) or experts spread, parameters are DTensors; inside
`forward` they are plain tensors, but for spread experts (`layers.exchange.held`).

Gradients are summed, never averaged: each process's loss is its share of the global one.
"""

import math
import os
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

from .. import counting
from ..checkpoint import device_memory
from ..initialisation import draw
from ..layers import Router
from ..layers.moe.experts import Experts, LinearExperts
from ..model import MoEMamba
from ..training.config import TrainConfig
from ..training.update.muon import takes_muon
from .processes import Processes


def check(config: TrainConfig, size: int) -> None:
    """Whether so many processes can train this.

    Raises:
        ValueError: with the field to change.
    """
    rows, parallel = config.batch_size, _expert_parallel(config, size)
    if rows % (size * config.accumulate):
        raise ValueError(
            f"batch_size is {rows}, which {size} processes times accumulate = {config.accumulate} do not divide; "
            f"choose a multiple of {size * config.accumulate}"
        )
    if size % parallel:
        raise ValueError(
            f"expert_parallel is {parallel}, which does not divide the {size} processes; choose one of its divisors"
        )
    if parallel > 1 and not config.model.routers:
        raise ValueError(f"expert_parallel is {parallel}, but the model has no experts; set it to 1")
    if parallel > 1 and config.compile and config.recompute:  # a layer is several graphs then, which torch mixes up
        raise ValueError(
            f"expert_parallel is {parallel}, with which compile and recompute do not go together; leave one of them out"
        )
    for experts in config.model.routers:
        if experts.n_experts % parallel:
            raise ValueError(
                f"n_experts is {experts.n_experts}, which expert_parallel = {parallel} does not divide; "
                "choose a multiple, or a divisor of n_experts"
            )
    groups = routing_groups(config, size) // config.accumulate
    if groups % size and size % groups:
        raise ValueError(
            f"routing_groups is {config.routing_groups}, which gives {groups} for a part of the batch and {size} "
            "processes; one of the two must divide the other"
        )


def check_used(config: TrainConfig, size: int) -> None:
    """Whether a run that begins uses what it was asked for. One that goes on may do so in fewer processes.

    Raises:
        ValueError: an option that would be ignored.
    """
    if config.max_skips != TrainConfig.max_skips and config.on_failure != "skip":
        raise ValueError(
            f'max_skips is {config.max_skips}, which only on_failure = "skip" heeds; give both, or neither'
        )
    if config.cooldown != TrainConfig.cooldown and config.schedule != "wsd" and not config.branch:
        raise ValueError(f'cooldown is {config.cooldown:g}, which only schedule = "wsd" has; give both, or neither')
    asked = {"expert_parallel": (config.expert_parallel, 1), "shard": (config.shard, "none")}
    for name, (value, alone) in asked.items():
        if size == 1 and value != alone:
            raise ValueError(
                f"{name} is {value}, which means nothing in one process; start several with torchrun, or leave it out"
            )


def _expert_parallel(config: TrainConfig, size: int) -> int:
    """Processes that experts are spread over; one alone has them all, so that it can resume any run."""
    return config.expert_parallel if size > 1 else 1


def routing_groups(config: TrainConfig, size: int) -> int:
    """Groups that a batch is routed in; one for each process and part if the configuration does not say."""
    return config.routing_groups or size * config.accumulate


def build(config: TrainConfig, processes: Processes, dtype: torch.dtype) -> MoEMamba:
    """The model on its device, sharded as the configuration says, with the weights that its seed gives.

    They are the same for every number of processes, and drawn one sub-layer at a time, so that no process need hold the
    whole model.
    """
    with torch.device("meta"):
        model = MoEMamba(config.model)
    if processes.distributed and (config.shard == "parameters" or _expert_parallel(config, processes.size) > 1):
        shard(model, config, processes, dtype)
    require_memory(model, config, processes.device)
    model.to_empty(device=processes.device)
    if config.model.tie_embeddings:
        model.head.weight = model.embedding.weight
    draw(model, fill, config.seed)
    model.recompute = config.recompute
    _group_routers(model, routing_groups(config, processes.size) // config.accumulate, processes)
    return model


def require_fit(config: TrainConfig, processes: Processes) -> None:
    """Refuse a model that cannot be trained here whatever its tokenizer, by counting alone; see `require_memory`.

    Raises:
        ValueError: weights, gradients and the optimiser's state are more than there is.
    """
    parallel = _expert_parallel(config, processes.size)
    share = 1 / (processes.size if config.shard == "parameters" else parallel)  # at least
    has = device_memory(processes.device)
    moments = 1 if config.optimizer == "muon" else 2
    counting.require_memory(config.model, has, moments, share * _neighbours(processes.device), vocabulary=False)


def require_memory(model: MoEMamba, config: TrainConfig, device: torch.device) -> None:
    """Refuse what cannot be trained, before its memory is asked for.

    Args:
        model: as it will be shared out; it may be on the meta device.
    Raises:
        ValueError: weights, gradients and the optimiser's state alone are more than the device, or the machine, holds.
    """
    has, needs = device_memory(device), 0
    for name, parameter in model.named_parameters():
        muon = config.optimizer == "muon" and takes_muon(name, parameter)
        needs += local(parameter).numel() * 4 * (3 if muon else 4)  # float32: weight, gradient, one or two averages
    if has is not None and (each := needs * _neighbours(device)) > has:
        where = "each GPU" if device.type == "cuda" else "this machine"
        raise ValueError(
            f"weights, gradients and the optimiser's state take {counting.size(each)} on {where}, which has "
            f"{counting.size(has)}; share them out over more processes with --shard parameters or --expert-parallel N"
        )


def _neighbours(device: torch.device) -> int:
    """Processes that share the memory of a device: on the CPU all of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def shard(model: MoEMamba, config: TrainConfig, processes: Processes, dtype: torch.dtype) -> None:
    """Replace a model's parameters by this process's parts of them.

    With bfloat16 activations, the matrices that products cast to bfloat16 anyway travel in it; master weights and
    gradients' sums are float32, and so are routers, norms, embedding, convolutions and what the scan reads.
    """
    size, whole = processes.size, config.shard == "none"
    parallel = _expert_parallel(config, size)
    kind = processes.device.type
    mesh = processes.limit(_mesh(kind, size, 1, whole))
    expert_mesh = processes.limit(_mesh(kind, size // parallel, parallel, whole))
    options: dict[str, Any] = {"reshard_after_forward": not whole}
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
        matrices: list[nn.Module] = [
            module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and "dt_proj" not in name
        ]
        if dtype != torch.float32 and matrices:
            fully_shard(matrices, mesh=_data(mesh), **cast)
        fully_shard(layer, mesh=_data(mesh), ignored_params=alone, **exact)
        own |= alone
    if not config.model.tie_embeddings:
        fully_shard(model.head, mesh=_data(mesh), **cast)
    fully_shard(model, mesh=_data(mesh), ignored_params=own, **exact)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo cannot scale on the way


def _mesh(kind: str, data: int, parallel: int, whole: bool) -> DeviceMesh:
    """All processes: neighbours share experts, the rest copies or shards."""
    shape = (data, 1, parallel) if whole else (1, data, parallel)
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


def _group_routers(model: MoEMamba, groups: int, processes: Processes) -> None:
    """Tell the routers their groups, `groups` in a part of the batch of all processes."""
    across = None
    if groups < processes.size:
        mesh = init_device_mesh(
            processes.device.type, (groups, processes.size // groups), mesh_dim_names=("group", "member")
        )
        across = processes.limit(mesh)["member"].get_group()
    for module in model.modules():
        if isinstance(module, Router):
            module.groups, module.across = max(1, groups // processes.size), across


def sharded(model: nn.Module) -> bool:
    """Whether a process holds only parts of some parameters, or copies that FSDP2 keeps alike."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


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
    parts = list(zip(torch._foreach_norm([local(gradient) for gradient in gradients]), gradients, strict=True))
    squares = torch.stack([part.square() / _copies(gradient) for part, gradient in parts]).sum()
    return processes.sum([squares])[0].sqrt()


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
    """Divide the gradient by `scale`, () float32, which all processes have alike."""
    torch._foreach_div_([local(parameter.grad) for parameter in parameters if parameter.grad is not None], scale)


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def local(tensor: Tensor) -> Tensor:
    """This process's part, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
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
