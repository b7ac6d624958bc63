"""Checkpoints that do not depend on the sharding, written while training goes on.

The first process puts the whole tensors together, one at a time, and writes the files that one process alone would:
they can be loaded, evaluated and resumed anywhere at once, with nothing to convert. That takes memory for the whole
model and its optimiser on the CPU of its machine, 12 bytes a parameter with AdamW. Reading takes a process no more
than its own part.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint import damaged, model_tensors, read_weights
from ..config import ModelConfig
from ..model import MoEMamba
from .optim import load_optimizer_tensors, optimizer_tensors
from .parallel import fill, whole
from .processes import Processes


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, on the CPU, untouched by what training does next."""

    config: ModelConfig
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    """the optimiser's state and that of the random generators"""
    position: dict[str, Any]


def take(
    model: MoEMamba, optimizer: torch.optim.Optimizer, position: dict[str, Any], processes: Processes
) -> Snapshot | None:
    """A snapshot in the first process, None in the others; all call this."""

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if processes.first:
                kept[name] = value.detach().to("cpu", copy=True).contiguous()
        return kept

    weights, training = copies(model_tensors(model)), copies(optimizer_tensors(model, optimizer))
    return Snapshot(model.config, weights, training | _random_state(), position) if processes.first else None


class Saver:
    """Writes one snapshot at a time in the background; an error surfaces at the next one, or at `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread, after the one before is done. An exit of the interpreter waits for it too."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until all is written; raises what writing raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error


def read_parts(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's tensors, of sharded ones this process's part, and the state of the random generators.

    Raises:
        CheckpointError: a file is missing or damaged, or is that of another model.
    """
    parameters = dict(model.named_parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        _read_weights(folder / "model.safetensors", model)
    else:
        read_weights(folder, model)
    file = folder / "training.safetensors"
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: _part(stored, name, parameters) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        _forget_random_state(tensors)
        load_optimizer_tensors(model, optimizer, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from error


def _read_weights(file: Path, model: MoEMamba) -> None:
    try:
        with safe_open(file, "pt") as stored:
            for name, tensor in model_tensors(model).items():
                part = stored.get_slice(name)
                if part.get_shape() != list(tensor.shape):
                    raise ValueError(f"{name} has shape {part.get_shape()}, expected {list(tensor.shape)}")
                fill(tensor, part)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(file, error) from error


def _part(stored: Any, name: str, parameters: dict[str, Any]) -> Tensor:
    """A tensor of the optimiser's state: sharded as its parameter is if they have one shape, else whole."""
    parameter, part = parameters.get(name.partition(".")[2]), stored.get_slice(name)
    if not isinstance(parameter, DTensor) or part.get_shape() != list(parameter.shape):
        return stored.get_tensor(name)  # type: ignore[no-any-return]
    own = torch.zeros_like(parameter, requires_grad=False)
    fill(own, part)
    return own


def _random_state() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _forget_random_state(tensors: dict[str, Tensor]) -> None:
    """Training draws nothing from torch's global generators: they belong to whoever calls it."""
    tensors.pop("random.cpu")
    tensors.pop("random.cuda", None)
