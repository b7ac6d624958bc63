"""A model that was handed to `train`: what a run writes down of it, so that nobody resumes with another."""

import zlib
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import CheckpointError, model_tensors
from ...host.files import FileError, read_json, write_json
from ...layers.quantised import expect_full
from ...model import MoEMamba, foreign_parts
from .directory import RunDirectory

GIVEN = "given.json"


def check_given(model: MoEMamba) -> None:
    """Raises ValueError if a model cannot be trained by the loop."""
    if not isinstance(model, MoEMamba):
        raise ValueError(
            f"model is a {type(model).__name__}; train takes a MoEMamba, with any of its parts replaced by yours"
        )
    expect_full(model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta or tensor.dtype != torch.float32:
            what = "on the meta device" if tensor.is_meta else f"{tensor.dtype}"
            raise ValueError(f"{name} is {what}; weights and optimiser are float32: hand in model.float()")


def describe(model: MoEMamba) -> dict[str, Any]:
    """Which parts of a model are not moemamba's own, and a checksum of its weights."""
    return {"parts": foreign_parts(model), "weights": fingerprint(model)}


def fingerprint(model: MoEMamba) -> int:
    """A checksum of all weights and buffers."""
    found = 0
    for name, tensor in model_tensors(model).items():
        found = zlib.crc32(_bytes(tensor), zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), found))
    return found


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def note_given(run: RunDirectory, model: MoEMamba | None) -> None:
    """Write down what a new run begins with, if that was handed in."""
    if model is not None:
        write_json(run.path / GIVEN, describe(model))


def check_resumed(run: RunDirectory, model: MoEMamba | None) -> None:
    """Whether a run can go on with this model, or without one.

    Raises:
        ValueError: it began with other parts, or without a model from outside, or with one that must be there.
    """
    begun = _read(run)
    if model is None:
        if begun and begun["parts"]:
            name, kind = next(iter(begun["parts"].items()))
            raise ValueError(
                f"the run in {run.path} trains a model of your own, whose {name} is {kind}; build it again and hand it "
                "in: train(config, resume=True, model=model)"
            )
        return
    if begun is None:
        raise ValueError(
            f"the run in {run.path} began without a model from outside; leave model out, or begin a new run"
        )
    if begun["parts"] != (parts := foreign_parts(model)):
        place = next(name for name in parts | begun["parts"] if parts.get(name) != begun["parts"].get(name))
        raise ValueError(
            f"{place} is {parts.get(place, 'as moemamba builds it')}, but the run in {run.path} began with "
            f"{begun['parts'].get(place, 'what moemamba builds')}; hand in a model of the same parts"
        )


def require_beginning(run: RunDirectory, model: MoEMamba | None) -> None:
    """Raises ValueError if a run that has saved nothing yet began with other weights than it would now."""
    begun = _read(run)
    if begun and (model is None or fingerprint(model) != begun["weights"]):
        raise ValueError(
            f"the run in {run.path} has saved nothing yet, and began with weights that were handed in; hand in a model "
            "with the same ones"
        )


def _read(run: RunDirectory) -> dict[str, Any] | None:
    file = run.path / GIVEN
    if not file.exists():
        return None
    try:
        found = read_json(file)
        parts, weights = found["parts"], found["weights"]
    except (FileError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore it from a copy") from error
    if (
        not isinstance(weights, int)
        or not isinstance(parts, dict)
        or not all(isinstance(each, str) for each in parts.values())
    ):
        raise CheckpointError(f"{file} does not describe a model; restore it from a copy")
    return found
