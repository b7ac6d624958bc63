"""Sequences that lie on several processes, a part on each: who has which, and the model told so."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..layers import BaseRouter, routers
from ..layers.parts import Parts
from ..model import MoEMamba
from .processes import Processes


def sharing(processes: Processes, parts: int) -> Parts | None:
    """The `parts` neighbours that share their sequences with this process; None if it has them alone."""
    if parts == 1:
        return None
    shape, names = (processes.size // parts, parts), ("reader", "part")
    mesh = processes.limit(init_device_mesh(processes.device.type, shape, mesh_dim_names=names))
    return Parts(mesh["part"].get_group())


def splitting(model: MoEMamba, parts: Parts | None) -> AbstractContextManager[Parts | None]:
    """`split_sequences` among these; nothing where each process has its sequences alone."""
    return nullcontext() if parts is None else split_sequences(model, parts)


@contextmanager
def split_sequences(model: MoEMamba, parts: Parts | dist.ProcessGroup | None = None) -> Iterator[Parts]:
    """Within it each process gives the model its part of every sequence, forward and backward.

    All processes have the same weights, and all go forward and backward alike. What the model returns is of this part:
    its logits, the mean loss over its targets, the state that it leaves. A state that is passed in is heeded in the
    first part alone. Gradients are those of the losses of all parts, each process's share, to be summed.

    Args:
        parts: made before, or the processes that have parts, in the order of their ranks; all processes if None.
    Raises:
        ValueError: layers have one router with a capacity, whose choices of earlier parts are counted for one alone.
    """
    made = parts if isinstance(parts, Parts) else Parts(parts)
    places = {name: module for name, module in routers(model).items() if isinstance(module, BaseRouter)}
    found = list(places.values())
    for name, router in places.items():
        if router.capacity_factor is not None and found.count(router) > 1:
            raise ValueError(
                f"the router of {name} serves other layers too, and has a capacity; with sequences over several "
                "processes give each layer its own, or set capacity_factor to None"
            )
    model.parts = made
    for router in found:
        router.parts = made
    try:
        yield made
        made.settle()
    finally:
        model.parts = None
        for router in found:
            router.parts = None
