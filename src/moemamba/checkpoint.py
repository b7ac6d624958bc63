"""Models on disk: directories that are complete or absent, whatever happens while they are written."""

import errno
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor

from .config import ModelConfig
from .host import files
from .host.files import expanded, new_directory, write_json
from .model import MoEMamba
from .reading import from_dict, to_dict
from .tokenizer import Tokenizer, load_tokenizer


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged; the message says which file, and what to do."""


def save(path: str | Path, model: MoEMamba, tokenizer: Tokenizer) -> None:
    """Write config.json, model.safetensors and tokenizer.json into a new directory.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: it cannot be written; what was there before is untouched.
    """
    with new_directory(expanded(path)) as folder:
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
    place, folder = find_device(device), expanded(path)
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
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
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
    write_tensors(folder / "model.safetensors", {name: tensor.contiguous() for name, tensor in tensors.items()})


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors by name; raises the system's OSError where it cannot."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the system's error is in its text alone
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from error


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
        return files.read_json(file)
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error
