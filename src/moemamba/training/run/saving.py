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
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...checkpoint import check_tensors, damaged, model_tensors, open_weights, verify
from ...config import ModelConfig
from ...distributed.processes import Processes
from ...distributed.sharding import fill, whole
from ...model import MoEMamba
from ...tensors import Stored, TensorFile
from ..update.optim import load_optimizer_tensors, optimizer_tensors

TRAINING = "training.safetensors"
_CPU, _CUDA = "random.cpu", "random.cuda"


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


def examine(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's tensors once and say whether `read_parts` can use them, while nothing has been changed.

    Raises:
        Damaged: a file is missing, or is not what was written.
        CheckpointError: the files are of another model or optimiser.
        OSError: the system cannot read them.
    """
    weights, training = open_weights(folder), open_weights(folder, TRAINING)
    check_tensors(weights, model_tensors(model))
    expected = _expected(model, optimizer)
    if _CUDA in training:  # of a GPU, whose driver says how long it is
        expected[_CUDA] = torch.empty(training[_CUDA].shape, dtype=torch.uint8, device="meta")
    check_tensors(training, expected, "model or optimiser")
    for stored in (weights, training):
        verify(stored)
    try:
        torch.Generator().set_state(training[_CPU][...])
    except RuntimeError as error:
        raise damaged(training.file, error) from error


def read_parts(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's tensors, of sharded ones this process's part, and the state of the random generators.

    Raises:
        CheckpointError: a file is missing or damaged, or is that of another model; see `examine`, which looks first.
        OSError: the system cannot read them.
    """
    weights, training = open_weights(folder), open_weights(folder, TRAINING)
    _fill(model, weights)
    parameters = dict(model.named_parameters())
    tensors = {name: _part(stored, parameters.get(name.partition(".")[2])) for name, stored in training.items()}
    _forget_random_state(tensors)
    load_optimizer_tensors(model, optimizer, tensors)


def read_model(folder: Path, model: MoEMamba) -> None:
    """Load the weights alone, of sharded ones this process's part; raises what `examine` raises."""
    weights = open_weights(folder)
    check_tensors(weights, model_tensors(model))
    verify(weights)
    _fill(model, weights)


def _fill(model: MoEMamba, weights: TensorFile) -> None:
    for name, tensor in model_tensors(model).items():
        fill(tensor, weights[name])


def _expected(model: MoEMamba, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training.safetensors must hold, as tensors that take no memory."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {_CPU: torch.empty(torch.get_rng_state().shape, dtype=torch.uint8, device="meta")}
    for group in optimizer.param_groups:
        keys = ("momentum_buffer",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            found[f"step.{names[parameter]}"] = torch.empty((), device="meta")
            found |= {f"{key}.{names[parameter]}": torch.empty(parameter.shape, device="meta") for key in keys}
    return found


def _part(stored: Stored, parameter: Tensor | None) -> Tensor:
    """A tensor of the optimiser's state: sharded as its parameter is if they have one shape, else whole."""
    if not isinstance(parameter, DTensor) or stored.shape != tuple(parameter.shape):
        return stored[...]
    own = torch.zeros_like(parameter, requires_grad=False)
    fill(own, stored)
    return own


def _random_state() -> dict[str, Tensor]:
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_CUDA] = torch.cuda.get_rng_state()
    return states


def _forget_random_state(tensors: dict[str, Tensor]) -> None:
    """Training draws nothing from torch's global generators: they belong to whoever calls it."""
    tensors.pop(_CPU)
    tensors.pop(_CUDA, None)
