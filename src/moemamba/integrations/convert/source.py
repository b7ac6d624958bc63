"""A model on disk as another program wrote it: its config.json, its tensors and its tokenizer, each looked at first."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...host.files import FileError, check_regular, expanded, read_json, read_text
from ...tensors import Stored, TensorFile
from ...text import Tokenizer, load_tokenizer

HUB = "hf:"
"""in front of the name of a model on the Hugging Face hub"""
WANTED = ["*.json", "*.safetensors", "*.bin", "*.jinja", "merges.txt"]
TEMPLATE = "chat_template.jinja"
INDEX_LIMIT = 1 << 26
"""bytes of the file that says where each tensor is"""


class Source(Mapping[str, "Stored | Tensor"]):
    """The folder of a model, or one file of weights with a config.json beside it; its tensors by name.

    Files of safetensors are read as their tensors are; those of PyTorch (.bin, .pt, .pth) are mapped into memory, and
    only tensors are taken from them, so that nothing in them is run.

    Raises:
        ValueError: there is no model here, or a file of it is not what it must be.
        OSError: it cannot be read.
    """

    def __init__(self, place: str):
        path = _downloaded(place.removeprefix(HUB)) if place.startswith(HUB) else expanded(place)
        if not path.exists():
            raise ValueError(
                f"there is nothing at {path}; name a folder, a file of weights, or {HUB}OWNER/NAME for one of the "
                "Hugging Face hub"
            )
        self.folder, self.files = (path, _files(path)) if path.is_dir() else (path.parent, [path])
        config = self.folder / "config.json"
        if not config.is_file():
            raise ValueError(f"there is no config.json beside the weights in {self.folder}; copy the one of the model")
        self.config: dict[str, Any] = read_json(config)
        self._tensors: dict[str, Stored | Tensor] = {}
        for file in self.files:
            self._add(file, dict(_read(file)))

    def _add(self, file: Path, tensors: dict[str, "Stored | Tensor"]) -> None:
        if twice := sorted(self._tensors.keys() & tensors.keys()):
            raise ValueError(f"{twice[0]} is in {file} and in another file too; keep one of them")
        self._tensors |= tensors

    def __getitem__(self, name: str) -> "Stored | Tensor":
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tokenizer(self, asked: str | None) -> Tokenizer:
        """That which is asked for, or the one that lies beside the weights; raises ValueError if there is none."""
        if asked is not None:
            return load_tokenizer(asked)
        try:
            return load_tokenizer(self.folder)
        except FileNotFoundError:
            raise ValueError(
                f"no tokenizer lies in {self.folder}; name one with --tokenizer, for instance that of "
                "EleutherAI/gpt-neox-20b for the models of state-spaces"
            ) from None

    def chat_template(self) -> str | None:
        """The template of conversations that lies beside the weights, if there is one."""
        if (file := self.folder / TEMPLATE).is_file():
            return read_text(file)
        if (file := self.folder / "tokenizer_config.json").is_file():
            template = read_json(file, INDEX_LIMIT).get("chat_template")
            return template if isinstance(template, str) else None
        return None


def _files(folder: Path) -> list[Path]:
    """The files with a model's weights: safetensors before others, one before parts of it."""
    for kind, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (whole := folder / f"{kind}.{end}").is_file():
            return [whole]
        if (index := folder / f"{kind}.{end}.index.json").is_file():
            return _parts(index)
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if len(found) == 1:
        return found
    seen = f"; there are {', '.join(file.name for file in found[:4])}: name one" if found else ""
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin{seen}")


def _parts(index: Path) -> list[Path]:
    places = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileError(f"{index} does not say which file each tensor is in; restore it")
    names = sorted(set(places.values()))
    if strange := [name for name in names if Path(name).name != name or len(name) > 255 or "\0" in name]:
        raise FileError(f"{index} names {strange[0][:80]!r}, which is no file beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index.parent / missing[0]} is missing, one of the {len(names)} parts of the model")
    return [index.parent / name for name in names]


def _read(file: Path) -> Mapping[str, "Stored | Tensor"]:
    if file.suffix == ".safetensors":
        stored = TensorFile(file)
        stored.verify()
        return stored
    check_regular(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # of other formats than the newest
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=_mappable(file))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged pickle raises is anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:160]
        raise ValueError(f"{file} is no file of tensors alone, as torch.save writes them ({said})") from error
    for inner in ("model", "state_dict"):  # as BlackMamba and Lightning wrap them
        if isinstance(found, dict) and isinstance(found.get(inner), dict):
            found = found[inner]
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not tensors by name")
    if strange := [name for name, value in found.items() if not (isinstance(name, str) and torch.is_tensor(value))]:
        raise ValueError(f"{file}: {str(strange[0])[:80]!r} is no tensor; save the model's state_dict alone")
    size = file.stat().st_size
    for name, tensor in found.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{file}: {name[:80]!r} is sparse, nested, quantised or without numbers; save it dense")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{file}: {name[:80]!r} is larger than the file; save it with all of its numbers")
    return found


def _mappable(file: Path) -> bool:
    """Whether it is an archive, as torch.save has written since 2020; older ones are read whole."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _downloaded(name: str) -> Path:
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        raise ValueError(f"{HUB}{name} needs huggingface_hub; pip install 'moemamba[hf]'") from error
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except errors.HFValidationError as error:
        raise ValueError(f"{HUB}{name} names no model of the Hugging Face hub; write {HUB}OWNER/NAME") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE forbids it" if constants.HF_HUB_OFFLINE else "there is no way to it through the network"
        raise OSError(
            f"{HUB}{name} cannot be fetched from the Hugging Face hub: {why}, and no copy is on this machine; name a "
            "folder with the model"
        ) from error
    except errors.GatedRepoError as error:
        raise OSError(
            f"{HUB}{name} is only for those whom its owner admits; ask for it at huggingface.co/{name}, then log in "
            "with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hugging Face hub shows no model {name}; check the name, or log in with: hf auth login"
        ) from error
    except Exception as error:  # its other errors derive from those of an HTTP library; or the disk is full
        if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{HUB}{name} cannot be fetched from the Hugging Face hub: {said}") from error
