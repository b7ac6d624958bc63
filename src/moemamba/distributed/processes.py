"""The processes that train together: which one this is, and what they tell each other."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..device import find_device

PATIENCE = timedelta(days=1)
"""how long others wait for what one process does alone: to tokenise, to write a checkpoint"""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model. Every method is called by all of them, in the same order."""

    device: torch.device
    rank: int = 0
    size: int = 1
    distributed: bool = False
    """whether there is a process group, be it of one"""
    timeout: timedelta = timedelta(minutes=10)
    """how long they wait for each other within a step"""
    patient: dist.ProcessGroup | None = None
    """all of them, over gloo, with `PATIENCE`; the default group if None"""

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
        dist.broadcast_object_list(said, group=self.patient)
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
        if self.size == 1:
            return fact
        count = torch.tensor(float(fact), device="cpu" if self.patient else self.device)
        dist.all_reduce(count, group=self.patient)
        return bool(count)

    def alike(self, value: Any, what: str) -> None:
        """Raises ValueError in all processes if they do not have the same value; `what` is in the plural."""
        if self.size == 1:
            return
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, (value, socket.gethostname()), group=self.patient)
        if odd := sorted({host for each, host in said if each != said[0][0]}):
            raise ValueError(
                f"the {what} on {', '.join(odd)} are not those on {said[0][1]}; give every machine the same"
            )

    def wait(self) -> None:
        """Until all are here, however long that takes."""
        self.any(False)

    def limit(self, mesh: DeviceMesh) -> DeviceMesh:
        """Give the groups of a mesh, which have PyTorch's own time limit, that of these processes."""
        for group in mesh.get_all_groups():
            _set_pg_timeout(self.timeout, group)
        return mesh


def sources() -> str:
    """Hash of the package's files, the same where the same code runs."""
    folder, found = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted(path for kind in ("*.py", "*.cu") for path in folder.rglob(kind)):
        found.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return found.hexdigest()


@contextmanager
def join(device: str, minutes: float = 10.0) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone.

    A GPU each where there are GPUs (NCCL), else the CPU (gloo). A process group that the caller made is used and left.

    Args:
        device: see `checkpoint.find_device`; "auto" or "cuda" is the GPU of this process's LOCAL_RANK.
        minutes: that processes wait for each other within a step before they take one for lost.
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
                'start one process for each GPU, or train with device="cpu"'
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    ours, timeout = not dist.is_initialized(), timedelta(minutes=minutes)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    lost = False
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size(), True, timeout, patient)
    except RuntimeError:  # another process is gone, for which leaving in order would wait
        lost = True
        raise
    finally:
        if not lost:
            dist.destroy_process_group(None if ours else patient)
