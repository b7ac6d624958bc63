"""Checkpoints read: the newest that is intact, looked at as a whole before anything is changed.

A process reads no more than its own part of the tensors.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...checkpoint import AVERAGED, Damaged, check_tensors, checkpoints, damaged, model_tensors, open_weights, verify
from ...distributed import Processes, fill
from ...model import MoEMamba
from ...state import State
from ...tensors import Stored, TensorFile
from ..update import Average, load_optimizer_tensors
from .directory import RunDirectory
from .position import Position, read_position
from .saving import CARRIED, RANDOM_CPU, RANDOM_CUDA, TRAINING


def restore(
    run: RunDirectory,
    model: MoEMamba,
    optimizer: torch.optim.Optimizer,
    content: str,
    notify: Callable[[str], None],
    processes: Processes,
    steps: int | None = None,
    average: Average | None = None,
) -> Position:
    """Load the newest checkpoint that is intact, and forget all that came after it. All processes call this.

    Only the first process says what is damaged: a file that another cannot read is no worse for it.

    Args:
        model, optimizer, average: sharded in any way; each process reads its own part of the files.
        content: hash of the training tokens, which must be that of the run.
        notify: told about checkpoints that are damaged, which are moved aside.
        steps: of the run; no checkpoint is from after them.
    Returns:
        where the run stands; the beginning if nothing was saved yet.
    Raises:
        CheckpointError: there are checkpoints, but none is intact, or they are of another model.
        ValueError: the training data has changed.
        OSError: this machine cannot read a checkpoint, which may be intact.
    """
    folder, position = processes.once(lambda: _newest(run.path, model, optimizer, notify, average))
    if folder is None:
        position.content = content
    if position.content != content:
        raise ValueError(f"the training data of {run.path} has changed since the run began; resume with the same data")
    if steps is not None and position.step > steps:
        raise ValueError(
            f"{run.path} is at step {position.step:,}, but the run is to have {steps:,}; resume with its own steps"
        )
    if folder is not None:
        _read(folder, model, optimizer, processes, average)
    processes.once(lambda: run.log.forget_after(position.step))
    return position


def _newest(
    run: Path,
    model: MoEMamba,
    optimizer: torch.optim.Optimizer,
    notify: Callable[[str], None],
    average: Average | None,
) -> tuple[Path | None, Position]:
    """The newest checkpoint that is intact, and its position; newer ones are moved aside."""
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            position = read_position(folder)
            examine(folder, model, optimizer, average)
            return folder, position
        except Damaged as error:
            if folder == found[0]:
                raise
            notify(f"{error}; it is now called {_put_aside(folder).name}")
    return None, Position()


def _read(
    folder: Path,
    model: MoEMamba,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    average: Average | None,
) -> None:
    """Every process's part; where one cannot, all stop, and nothing is moved aside."""
    failed: Exception | None = None
    try:
        read_parts(folder, model, optimizer, average)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        failed = error
    if processes.any(failed is not None):
        raise failed or OSError(
            f"{folder} is intact here ({socket.gethostname()}), but another process could not read it; "
            "the run directory must be the same for all machines"
        )


def _put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint; what was set aside before stays."""
    names = (f"damaged-{folder.name}{f'.{number}' if number else ''}" for number in range(1 << 16))
    aside = next(place for name in names if not os.path.lexists(place := folder.with_name(name)))
    return folder.rename(aside)


def examine(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer, average: Average | None = None) -> None:
    """Read a checkpoint's tensors once and say whether `read_parts` can use them, while nothing has been changed.

    Raises:
        Damaged: a file is missing, or is not what was written.
        CheckpointError: the files are of another model or optimiser.
        OSError: the system cannot read them.
    """
    weights, training = open_weights(folder), open_weights(folder, TRAINING)
    check_tensors(weights, model_tensors(model))
    expected = _expected(model, optimizer)
    if RANDOM_CUDA in training:  # of a GPU, whose driver says how long it is
        expected[RANDOM_CUDA] = torch.empty(training[RANDOM_CUDA].shape, dtype=torch.uint8, device="meta")
    check_tensors(training, expected, "model or optimiser")
    averaged = [open_weights(folder / AVERAGED)] if average else []
    for stored in averaged:
        check_tensors(stored, model_tensors(model))
    for stored in (weights, training, *averaged):
        verify(stored)
    try:
        torch.Generator().set_state(training[RANDOM_CPU][...])
    except RuntimeError as error:
        raise damaged(training.file, error) from error


def read_parts(folder: Path, model: MoEMamba, optimizer: torch.optim.Optimizer, average: Average | None = None) -> None:
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
    if average is not None:
        stored = open_weights(folder / AVERAGED)
        for name, tensor in average.tensors.items():
            fill(tensor, stored[name])


def read_model(folder: Path, model: MoEMamba) -> None:
    """Load the weights alone, of sharded ones this process's part; raises what `examine` raises."""
    weights = open_weights(folder)
    check_tensors(weights, model_tensors(model))
    verify(weights)
    _fill(model, weights)


def read_carried(run: RunDirectory, position: Position, rows: int) -> State:
    """The state that each row of the next batch begins with, of a run that carries state.

    Raises:
        Damaged: the checkpoint lacks it, or it is not of so many rows.
    """
    file = run.path / "checkpoints" / f"{position.step:08d}" / CARRIED
    try:
        state = State.load(file)
    except (FileNotFoundError, ValueError) as error:
        raise damaged(file, error) from error
    if state.batch_size != rows:
        raise damaged(file, ValueError(f"it has {state.batch_size} rows in place of {rows}"))
    return state


def _fill(model: MoEMamba, weights: TensorFile) -> None:
    for name, tensor in model_tensors(model).items():
        fill(tensor, weights[name])


def _expected(model: MoEMamba, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training.safetensors must hold, as tensors that take no memory."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {RANDOM_CPU: torch.empty(torch.get_rng_state().shape, dtype=torch.uint8, device="meta")}
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


def _forget_random_state(tensors: dict[str, Tensor]) -> None:
    """Training draws nothing from torch's global generators: they belong to whoever calls it."""
    tensors.pop(RANDOM_CPU)
    tensors.pop(RANDOM_CUDA, None)
