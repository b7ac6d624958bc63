"""Models on disk: directories that are complete or absent, whatever happens while they are written."""

import json
import re
import zlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .config import ModelConfig, description, parse_pattern
from .counting import require_memory
from .device import find_device
from .host import files, memory
from .host.files import FileError, check_regular, expanded, new_directory, write_json
from .layers.quantised import NO_GRADIENT, keep_scales, misfit, quantise, quantised
from .model import MoEMamba, foreign_parts
from .reading import from_dict
from .tensors import CHECKSUMS, TensorFile, differences, not_finite, write_tensors
from .text import NoTokenizer, Tokenizer, load_tokenizer, tokenizer_config

TOKENIZER_LIMIT = 200_000_000
"""bytes of a tokenizer.json"""
AVERAGED = "averaged"
"""the folder in a checkpoint of a run that has the model with averaged weights"""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which file, and what to do."""


class Damaged(CheckpointError):
    """A file of a checkpoint is missing, or its header, its checksum or its values are not what was written."""


def save(path: str | Path, model: torch.nn.Module, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and tokenizer.json into a new directory.

    Args:
        model: a MoEMamba, which `torch.compile` or DataParallel may have wrapped. Parts of it may be yours: their names
            are written down, and `load` wants them back (`into`).
        tokenizer: None for a model of what is no text.
    Raises:
        ValueError: what would be written could not be loaded again.
        FileExistsError: there is something at `path` already.
        OSError: it cannot be written; what was there before is untouched.
    """
    inner = unwrapped(model)
    tensors = saveable(inner)
    if tokenizer is not None:
        _require_vocabulary(inner.config, tokenizer, "the tokenizer")
    with new_directory(expanded(path)) as folder:
        write_model(folder, inner.config, tensors, tokenizer, foreign_parts(inner))


def load(
    path: str | Path,
    device: str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    into: MoEMamba | None = None,
    weights: Literal["int8"] | None = None,
) -> tuple[MoEMamba, Tokenizer]:
    """A model in evaluation mode, and its tokenizer; of a model that was saved without one, one that says so.

    Args:
        path: a directory that `save` has written, or a run directory, whose newest checkpoint is meant; "RUN/averaged"
            means that checkpoint's averaged weights (`TrainConfig.average`).
        device: see `find_device`; with `into` that of the model.
        dtype: of the weights, such as torch.bfloat16; as they were saved, which is float32, if None.
        into: a model that gets the weights, in place of one that is built: one with parts of your own.
        weights: "int8" rounds matrices to 8 bits, with a float32 scale a row: for generation on a CPU, faster and in a
            quarter of the memory. Such a model cannot be trained. As they were saved if None.
    Raises:
        CheckpointError: there is none, it is damaged, its files do not belong together, or it has parts that moemamba
            does not build.
        ValueError: this machine has no such device, or too little memory.
        OSError: the system cannot read it.
    """
    place, folder = find_device(device), find_model(expanded(path))
    if place.type == "meta":
        raise ValueError("device 'meta' holds no numbers; try cpu")
    if weights not in (None, INT8):
        raise ValueError(f"weights is {weights!r}; choose {INT8!r}, or None for those of the file")
    config = from_dict(ModelConfig, read_json(folder / "config.json"), str(folder / "config.json"))
    require_memory(config, device_memory(place))
    stored = open_weights(folder)
    if into is None:
        _require_own(stored)
    model = outline(config, stored) if into is None else into
    packed = stored.metadata.get(WEIGHTS) == INT8
    rounds = packed and not quantised(model)
    check_tensors(stored, model_tensors(_rounded(model) if rounds else model))
    verify(stored)
    if rounds:
        quantise(model)
    if dtype is not None:
        model.to(dtype=dtype)
        keep_scales(model)
    if into is None:
        model.to_empty(device=place)
        if config.tie_embeddings:
            model.head.weight = model.embedding.weight
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(stored[name][...])
    if strange := not_finite(model_tensors(model)):
        raise CheckpointError(
            f"{stored.file} holds numbers that are not finite ({strange}), with which nothing can be computed; "
            f"{_instead(stored.file)}"
        )
    if packed and (wrong := misfit(model_tensors(model))):
        raise damaged(stored.file, f"{wrong} holds what no weight of 8 bits can be")
    if weights == INT8 and not packed:
        quantise(model)
    untold = stored.metadata.get("tokenizer") == "none"
    return model.eval(), NoTokenizer(config.vocab_size) if untold else _read_tokenizer(folder, config)


def checksums(folder: Path) -> dict[str, int]:
    """Of each tensor of a model that `load` has loaded; those of its bytes where the file has none."""
    stored = open_weights(folder)
    values = files.parse_json(stored.metadata.get(CHECKSUMS, "{}"), str(stored.file))
    if isinstance(values, dict) and values.keys() == stored.keys():
        return {name: int(value) for name, value in values.items()}
    return {name: zlib.crc32(_bytes(tensor[...])) for name, tensor in stored.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def find_model(path: Path) -> Path:
    """The directory of a model: `path` itself, or the newest checkpoint of the run there.

    Raises:
        CheckpointError: there is none; the message says what there is.
    """
    if newest := newest_of(path):
        return newest
    if not path.is_dir():
        raise CheckpointError(f"there is no model at {path}; name a directory that train or save has written")
    if runs := sorted(path.glob("*/seed-*/train.json")):
        raise CheckpointError(f"{path} holds a comparison; name one of its runs, such as {runs[0].parent}")
    if (path / "train.json").exists():
        raise CheckpointError(
            f"the run in {path} has no checkpoint yet; go on with it until it saves one (resume=True)"
        )
    if (path / "config.json").exists() or (path / "tokenizer.json").exists():
        raise damaged(path / "model.safetensors", "")
    raise CheckpointError(f"{path} holds no model; name a run, a checkpoint, or a directory that save has written")


def newest_of(path: Path) -> Path | None:
    """The directory of a model as `find_model` takes it: None if there is none.

    Raises:
        CheckpointError: averaged weights are asked for, which the newest checkpoint of the run does not have.
    """
    if (path / "model.safetensors").exists():
        return path
    if found := checkpoints(path):
        return found[-1]
    if path.name != AVERAGED or not (found := checkpoints(path.parent)):
        return None
    if not (found[-1] / AVERAGED).is_dir():
        raise CheckpointError(f"{found[-1]} has no averaged weights; a run has them with average = 0.999 or the like")
    return found[-1] / AVERAGED


def device_memory(device: torch.device) -> int | None:
    """Bytes that a device has for this process at most; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory.limit() if device.type == "cpu" else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"[0-9]{8,}", path.name)] if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name))


PARTS = "parts"
"""in a file of weights, which modules of its model moemamba does not build"""
WEIGHTS, INT8 = "weights", "int8"
"""in a file of weights, that matrices have 8 bits"""


def _require_own(stored: TensorFile) -> None:
    """Raises CheckpointError if a file has the weights of a model with parts of somebody's own."""
    if parts := stored.metadata.get(PARTS):
        name, kind = next(iter(files.parse_json(parts, f"the list of parts in {stored.file}").items()))
        raise CheckpointError(
            f"{stored.file} is of a model whose {name} is {kind}, which moemamba does not build; build that model and "
            "give it: load(path, into=model)"
        )


def model_tensors(model: MoEMamba) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once, as model.safetensors holds them."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def unwrapped(model: torch.nn.Module) -> MoEMamba:
    """The model inside what `torch.compile`, DataParallel and DistributedDataParallel make of it.

    Raises:
        ValueError: there is none.
    """
    inner = model
    while not isinstance(inner, MoEMamba):
        held = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(held, torch.nn.Module):
            raise ValueError(f"{type(model).__name__} is no MoEMamba model; save the model that it was made from")
        inner = held
    return inner


def saveable(model: MoEMamba) -> dict[str, Tensor]:
    """The tensors of a model as its configuration names them, which `load` will find.

    Raises:
        ValueError: they are not those of its configuration, or not finite.
    """
    found = {
        name.replace("_orig_mod.", ""): tensor.detach()
        for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, tensor in kind
    }
    with torch.device("meta"):
        like = MoEMamba(model.config)
    if quantised(model):
        quantise(like)
    expected = model_tensors(like)
    if model.config.tie_embeddings and found.get("head.weight") is not None:
        if model.head.weight is not model.embedding.weight:
            raise ValueError(
                "the head has weights of its own, but the configuration says tie_embeddings; set it to False"
            )
        del found["head.weight"]
    parts = foreign_parts(model)
    if parts:
        expected = found
    elif wrong := differences(found, expected):
        raise ValueError(f"the model is not what its configuration says: {wrong}; it could not be loaded again")
    if other := [name for name, tensor in found.items() if tensor.is_meta or hasattr(tensor, "full_tensor")]:
        raise ValueError(f"{other[0]} is not whole on this device; save the model with its weights in one process")
    if strange := not_finite(found):
        raise ValueError(f"the model has weights that are not finite ({strange}); it could not be used again")
    return {name: found[name] for name in expected}


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer | None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """The three files that `load` needs, and the one besides that transformers does, into an existing directory.

    Args:
        tokenizer: None where there is none, and then only the first two are written.
        parts: those of the model that moemamba does not build (`foreign_parts`).
    """
    about = {PARTS: json.dumps(parts)} if parts else {}
    if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        about[WEIGHTS] = INT8
    if tokenizer is None or isinstance(tokenizer, NoTokenizer):
        about["tokenizer"] = "none"
        write_json(folder / "config.json", description(config, None))
    else:
        write_json(folder / "config.json", description(config, tokenizer.end_of_text))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
        files.replace(folder / "tokenizer.json", tokenizer.to_json())
    write_tensors(folder / "model.safetensors", tensors, about)


def _rounded(model: MoEMamba) -> MoEMamba:
    """On the meta device what a model is with weights of 8 bits; the model stays as it is."""
    own = {id(each): torch.nn.Parameter(each.detach().to("meta")) for each in model.parameters()}
    found = deepcopy(model, own | {id(each): each.to("meta") for each in model.buffers()})
    quantise(found)
    return found


def open_weights(folder: Path, name: str = "model.safetensors") -> TensorFile:
    """The header of a file of tensors; raises Damaged if that is not one."""
    try:
        return TensorFile(folder / name)
    except (FileError, FileNotFoundError) as error:
        raise damaged(folder / name, error) from error


def expect_full_file(folder: Path) -> None:
    """Of the folder of a model that another program is to read; one without weights is its affair.

    Raises:
        CheckpointError: the weights there have 8 bits.
    """
    if (folder / "model.safetensors").is_file() and open_weights(folder).metadata.get(WEIGHTS) == INT8:
        raise CheckpointError(f"{folder} cannot be read here: {NO_GRADIENT}")


def verify(stored: TensorFile) -> None:
    """Compare a file with its checksums; raises Damaged if it has others."""
    try:
        stored.verify()
    except FileError as error:
        raise damaged(stored.file, error) from error


def outline(config: ModelConfig, stored: TensorFile) -> MoEMamba:
    """The model of a configuration on the meta device, which takes no memory.

    Raises:
        CheckpointError: it has more layers than the file has tensors, so that nobody need build it.
    """
    layers = len(parse_pattern(config.pattern)) * config.n_blocks
    if layers > len(stored):
        verify(stored)
        raise CheckpointError(
            f"{stored.file} holds {len(stored):,} tensors, too few for the {layers:,} layers of the model that "
            "config.json describes; put the two files there that belong together"
        )
    with torch.device("meta"):
        return MoEMamba(config)


def check_tensors(stored: TensorFile, expected: Mapping[str, Tensor], what: str = "model") -> None:
    """Compare names, shapes and dtypes with what is due, before anything is read; see `differences`.

    Raises:
        Damaged: they differ, and so do the checksums.
        CheckpointError: they differ, since this is another model.
    """
    if wrong := differences(stored, expected):
        verify(stored)
        raise CheckpointError(
            f"{stored.file} is of another {what} than the configuration describes: {wrong}; "
            "put the files there that belong together"
        )


def damaged(file: Path, error: Exception | str) -> Damaged:
    """The error that says what is wrong with a checkpoint's file, and which checkpoint to use instead."""
    said = (str(error).splitlines() or [type(error).__name__])[0].removeprefix(f"{file} ").removeprefix(f"{file}: ")
    what = "is missing" if not file.exists() else f"is damaged or incomplete ({said})"
    return Damaged(f"{file} {what}; {_instead(file)}")


def read_json(file: Path, most: int = files.JSON_LIMIT) -> dict[str, object]:
    """A JSON object of a checkpoint; raises Damaged, or the system's OSError."""
    try:
        return files.read_json(file, most)
    except (FileNotFoundError, FileError) as error:
        raise damaged(file, error) from error


def _instead(file: Path) -> str:
    others = [str(path) for path in checkpoints(file.parent.parent.parent) if path != file.parent]
    return f"use {others[-1]} instead" if others else "restore it from a copy"


def _read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            check_regular(file, TOKENIZER_LIMIT)
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ValueError) as error:
        raise damaged(file, error) from error
    _require_vocabulary(config, tokenizer, str(file))
    return tokenizer


def _require_vocabulary(config: ModelConfig, tokenizer: Tokenizer, name: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{name} has {tokenizer.vocab_size:,} tokens, more than the vocabulary of {config.vocab_size:,} of the "
            "model; they do not belong together"
        )
