"""The processes that train together: which one this is, and what they tell each other."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint import find_device

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model. Every method is called by all of them, in the same order."""

    device: torch.device
    rank: int = 0
    size: int = 1
    distributed: bool = False
    """whether there is a process group, be it of one"""

    @property
    def first(self) -> bool:
        """The one that writes and reports."""
        return self.rank == 0

    def once(self, function: Callable[[], Result]) -> Result:
        """Call in the first process; all return what it returned.

        Raises:
            Exception: in the first process, what the function raised; the others leave quietly (`SystemExit`).
        """
        if self.size == 1:
            return function()
        said: list[Any] = [None, False]
        error = None
        if self.first:
            try:
                said = [function(), True]
            except Exception as caught:
                error = caught
        dist.broadcast_object_list(said)
        if error is not None:
            raise error
        if not said[1]:
            raise SystemExit(1)
        result: Result = said[0]
        return result

    def first_of_machine_first(self, function: Callable[[], Result]) -> Result:
        """Call in one process of each machine, then in the others, which find what it left on the disk."""
        leads = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result = function() if leads or self.size == 1 else None
        self.wait()
        return function() if result is None else result

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """Sums over the processes, of tensors of one dtype; without gradient."""
        if self.size == 1:
            return values
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def any(self, fact: bool) -> bool:
        """Whether it holds in any process."""
        (count,) = self.sum([torch.tensor(float(fact), device=self.device)])
        return bool(count)

    def alike(self, value: Any, what: str) -> None:
        """Raises ValueError in all processes if they do not have the same value; `what` is in the plural."""
        if self.size == 1:
            return
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, (value, socket.gethostname()))
        if odd := sorted({host for each, host in said if each != said[0][0]}):
            raise ValueError(
                f"the {what} on {', '.join(odd)} are not those on {said[0][1]}; give every machine the same"
            )

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone.

    A GPU each where there are GPUs (NCCL), else the CPU (gloo). A process group that the caller made is used and left.

    Args:
        device: see `checkpoint.find_device`; "auto" or "cuda" is the GPU of this process's LOCAL_RANK.
    Raises:
        ValueError: this machine has no such device, or fewer GPUs than processes.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and not dist.is_initialized():
        place = find_device(device)
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():  # Triton asks for the current one
            yield Processes(place)
        return
    place = find_device(device)
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own, since there are {torch.cuda.device_count()}; "
                "start one process for each GPU, or train with --device cpu"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    lost = False
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size(), True)
    except RuntimeError:  # another process is gone, for which leaving in order would wait
        lost = True
        raise
    finally:
        if ours and not lost:
            dist.destroy_process_group()
