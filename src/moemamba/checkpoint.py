"""Models on disk: directories that are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor

from .config import ModelConfig, from_dict, to_dict
from .model import MoEMamba
from .tokenizer import Tokenizer, load_tokenizer

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged; the message says which file, and what to do."""


def save(path: str | Path, model: MoEMamba, tokenizer: Tokenizer) -> None:
    """Write config.json, model.safetensors and tokenizer.json into a new directory.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: it cannot be written; what was there before is untouched.
    """
    with new_directory(Path(path)) as folder:
        write_model(folder, model.config, model_tensors(model), tokenizer)


def load(path: str | Path, device: str = "cpu") -> tuple[MoEMamba, Tokenizer]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        path: a directory that `save` has written, or a run directory, whose newest checkpoint is meant.
        device: see `find_device`.
    Raises:
        CheckpointError: there is none, or it is damaged.
        ValueError: this machine has no such device.
    """
    place, folder = find_device(device), Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model at {path}; name a directory that train or save has written")
    if not (folder / "model.safetensors").exists() and (found := checkpoints(folder)):
        folder = found[-1]
    config = from_dict(ModelConfig, read_json(folder / "config.json"), str(folder / "config.json"))
    model = MoEMamba(config)
    read_weights(folder, model)
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise damaged(folder / "tokenizer.json", error) from error
    return model.to(place).eval(), tokenizer


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is a GPU where there is one, else the CPU.

    Raises:
        ValueError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0].split('. ')[0]}); try cpu"
        ) from error
    return device


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def model_tensors(model: MoEMamba) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once, as model.safetensors holds them."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def write_model(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """The three files that `load` needs, into an existing directory."""
    write_json(folder / "config.json", to_dict(config))
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def read_weights(folder: Path, model: MoEMamba) -> None:
    """Load model.safetensors into a model, on the device where the model is.

    Raises:
        CheckpointError: the file is missing or damaged, or holds another model.
    """
    file = folder / "model.safetensors"
    try:
        load_model(model, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error that says what is wrong with a checkpoint's file, and which checkpoint to use instead."""
    others = [str(path) for path in checkpoints(file.parent.parent.parent) if path != file.parent]
    instead = f"use {others[-1]} instead" if others else "restore it from a copy"
    what = "is missing" if not file.exists() else f"is damaged or incomplete ({str(error).splitlines()[0]})"
    return CheckpointError(f"{file} {what}; {instead}")


def read_json(file: Path) -> dict[str, object]:
    """A JSON object of a checkpoint; raises CheckpointError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error
    return values


def write_json(file: Path, values: dict[str, object]) -> None:
    """Write an indented JSON object."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears at `path` complete or not at all: written beside it, flushed to disk, and renamed.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: the disk is full, or the place cannot be written.
    """
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another place, or remove it")
        shutil.rmtree(beside, ignore_errors=True)  # of a killed process that had our number, as in a container
        beside.mkdir(parents=True)
        yield beside
        for file in (*beside.iterdir(), beside):
            flush(file)
        beside.rename(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileExistsError) or (isinstance(error, OSError) and error.errno not in _FULL):
            raise
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; "
            "free space or choose another place; nothing that was saved before is lost"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
