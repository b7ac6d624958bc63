"""How a run spreads over its processes: whether it can, whether it fits their memory, and its model built so."""

import os

import torch

from .. import counting
from ..checkpoint import device_memory
from ..distributed import Processes, fill, group_routers, own_part, shard
from ..initialisation import draw
from ..layers import roles
from ..model import MoEMamba
from .config import TrainConfig


def check(config: TrainConfig, size: int) -> None:
    """Whether so many processes can train this.

    Raises:
        ValueError: with the field to change.
    """
    check_carried(config, size)
    rows, parallel, parts = config.batch_size, _expert_parallel(config, size), sequence_parallel(config, size)
    if size % parts:
        raise ValueError(
            f"sequence_parallel is {parts}, which does not divide the {size} processes; choose one of its divisors"
        )
    readers = size // parts
    if rows % (readers * config.accumulate):
        each = f" by {parts}" if parts > 1 else ""
        raise ValueError(
            f"batch_size is {rows}, which {size} processes{each} times accumulate = {config.accumulate} do not divide; "
            f"choose a multiple of {readers * config.accumulate}"
        )
    if config.context % parts:
        raise ValueError(
            f"context is {config.context}, which sequence_parallel = {parts} does not divide; choose a multiple"
        )
    if parts > 1 and (parallel > 1 or config.shard == "parameters"):
        what = f"expert_parallel is {parallel}" if parallel > 1 else 'shard is "parameters"'
        raise ValueError(
            f"sequence_parallel is {parts}, for which each process must have all parameters, but {what}; "
            "leave one of the two out"
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
        if experts.count % parallel:
            raise ValueError(
                f"n_experts is {experts.count}, which expert_parallel = {parallel} does not divide; "
                "choose a multiple, or a divisor of n_experts"
            )
    groups = routing_groups(config, size) // config.accumulate
    if parts > 1 and groups % readers:
        raise ValueError(
            f"routing_groups is {config.routing_groups}, which gives {groups} for a part of the batch; with "
            f"sequence_parallel = {parts} choose a multiple of {readers}"
        )
    if groups % readers and readers % groups:
        raise ValueError(
            f"routing_groups is {config.routing_groups}, which gives {groups} for a part of the batch and {size} "
            "processes; one of the two must divide the other"
        )


def check_carried(config: TrainConfig, size: int) -> None:
    """Whether rows can begin with the state of the batch before.

    Raises:
        ValueError: with the reason.
    """
    if not config.carry_state:
        return
    model = config.model
    growing = [each for each in model.letters if each.state_bytes(model, 2, 4) > each.state_bytes(model, 1, 4)]
    why = ""
    if size > 1:
        why = f"{size} processes train; start one"
    elif not counting.state_bytes(model, 1):
        why = f"no letter of the pattern {config.model.pattern!r} has a state; choose one with M"
    elif growing:
        why = f"the state of {growing[0].name} grows with every token; choose a pattern without it"
    if why:
        raise ValueError(f"carry_state keeps the state of each row in one process, at one size, but {why}")


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
    asked = {
        "expert_parallel": (config.expert_parallel, 1),
        "sequence_parallel": (config.sequence_parallel, 1),
        "shard": (config.shard, "none"),
    }
    for name, (value, alone) in asked.items():
        if size == 1 and value != alone:
            raise ValueError(
                f"{name} is {value}, which means nothing in one process; start several with torchrun, or leave it out"
            )


def _expert_parallel(config: TrainConfig, size: int) -> int:
    """Processes that experts are spread over; one alone has them all, so that it can resume any run."""
    return config.expert_parallel if size > 1 else 1


def sequence_parallel(config: TrainConfig, size: int) -> int:
    """Processes that share a sequence; one alone has all of it, so that it can resume any run."""
    return config.sequence_parallel if size > 1 else 1


def rows_of(config: TrainConfig, size: int) -> int:
    """Rows that one process has of a part of a batch."""
    return config.batch_size // (config.accumulate * (size // sequence_parallel(config, size)))


def routing_groups(config: TrainConfig, size: int) -> int:
    """Groups that a batch is routed in; one for each set of rows and part if the configuration does not say."""
    return config.routing_groups or size // sequence_parallel(config, size) * config.accumulate


def build(config: TrainConfig, processes: Processes, dtype: torch.dtype, given: MoEMamba | None = None) -> MoEMamba:
    """The model on its device, sharded as the configuration says, with the weights that its seed gives, or those that
    a model has which was handed in.

    They are the same for every number of processes, and drawn one sub-layer at a time, so that no process need hold the
    whole model.
    """
    if given is None:
        with torch.device("meta"):
            model = MoEMamba(config.model)
    else:
        model = given.to(processes.device)
    if processes.distributed and (config.shard == "parameters" or _expert_parallel(config, processes.size) > 1):
        shard(model, processes, dtype, config.shard == "none", _expert_parallel(config, processes.size))
    require_memory(model, config, processes.device)
    if given is None:
        model.to_empty(device=processes.device)
        if config.model.tie_embeddings:
            model.head.weight = model.embedding.weight
        draw(model, fill, config.seed)
    model.recompute = config.recompute
    parts = sequence_parallel(config, processes.size)
    group_routers(model, routing_groups(config, processes.size) // config.accumulate, processes, parts)
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
    has, needs, role = device_memory(device), 0, roles(model)
    for name, parameter in model.named_parameters():
        muon = config.optimizer == "muon" and role[name].muon
        needs += own_part(parameter).numel() * 4 * (3 if muon else 4)  # float32: weight, gradient, one or two averages
    if has is not None and (each := needs * _neighbours(device)) > has:
        where = "each GPU" if device.type == "cuda" else "this machine"
        raise ValueError(
            f"weights, gradients and the optimiser's state take {counting.size(each)} on {where}, which has "
            f'{counting.size(has)}; share them out over more processes with shard="parameters" or expert_parallel=N'
        )


def _neighbours(device: torch.device) -> int:
    """Processes that share the memory of a device: on the CPU all of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
