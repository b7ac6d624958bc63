"""Tensors on disk: safetensors files, looked at before they are read, with a checksum of each tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header that gives the
dtype, shape and place of each tensor, and the tensors' bytes. The checksums lie in the header's `__metadata__`, where
other readers do not mind them; files without them, as other programs and versions before 0.2 write, are read too.

Why not the library of that name: it has no checksums, so that a flipped bit loads as a weight; and what is damaged must
be told from what this machine cannot read (`host.files`). Tests read with it what is written here, and the other way.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .host.files import FileError, check_regular, parse_json, reading, replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_BLOCK = 1 << 24  # bytes read at once
CHECKSUMS = "crc32"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which an index reads no more than it names: `stored[2:4]`, `stored[...]`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """where its bytes begin in the file"""

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        kind = f"<i{self.dtype.itemsize}"  # numpy has no bfloat16, and only the bytes matter
        if not self.nbytes:
            return torch.from_numpy(np.empty(self.shape, kind)[index]).view(self.dtype)
        with reading(self.file):
            whole = np.memmap(self.file, kind, "r", self.first, self.shape)
        return torch.from_numpy(np.array(whole[index])).view(self.dtype)


class TensorFile(Mapping[str, Stored]):
    """The tensors of a safetensors file by name, of which only the header has been read.

    Raises:
        FileError: it is no safetensors file, or cut short.
        OSError: it is missing or cannot be read.
    """

    def __init__(self, file: Path):
        self.file = file
        size = check_regular(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise FileError(f"{file} has no header of a safetensors file")
            header = _parse(stream.read(length), file)
        self.metadata = _strings(header.pop("__metadata__", {}), file)
        self._tensors = {name: _stored(file, name, values, 8 + length) for name, values in header.items()}
        end = 8 + length
        for tensor in sorted(self._tensors.values(), key=lambda tensor: (tensor.first, tensor.nbytes)):
            if tensor.first != end:
                raise FileError(f"{file} has a header whose tensors overlap or leave gaps")
            end += tensor.nbytes
        if end != size:
            raise FileError(f"{file} has {size:,} bytes, but its header says {end:,}")

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def verify(self) -> None:
        """Read all of the file once and compare its checksums, if it has them.

        Raises:
            FileError: a tensor, its name, its dtype or its shape is not what was written.
            OSError: the file cannot be read.
        """
        if CHECKSUMS not in self.metadata:
            return
        expected = parse_json(self.metadata[CHECKSUMS], f"the list of checksums in {self.file}")
        if not isinstance(expected, dict) or expected.keys() != self.keys():
            raise FileError(f"{self.file} has checksums of other tensors than it holds")
        with self.file.open("rb") as stream:
            for name, tensor in self.items():
                stream.seek(tensor.first)
                found, left = _begin(name, tensor.dtype, tensor.shape), tensor.nbytes
                while left:
                    block = stream.read(min(left, _BLOCK))
                    if not block:
                        raise FileError(f"{self.file} was cut short while it was read")
                    found, left = zlib.crc32(block, found), left - len(block)
                if expected[name] != found:
                    raise FileError(f"{self.file}: {name[:80]!r} does not have the checksum that it was written with")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device by name, with their checksums, at once or not at all.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # each on a multiple of its size
    checksums: dict[str, int] = {}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        shape = tuple(tensor.shape)
        checksums[name] = zlib.crc32(_bytes(tensor), _begin(name, tensor.dtype, shape))
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(shape), "data_offsets": [begin, end]}
    said = {"format": "pt", **(metadata or {}), CHECKSUMS: json.dumps(checksums)}
    text = json.dumps({"__metadata__": said, **header}).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(_bytes(tensor))


def differences(found: Mapping[str, Stored | Tensor], expected: Mapping[str, Tensor], most: int = 3) -> str:
    """What of some tensors does not fit, the first few by name; nothing if all does.

    Floating-point numbers of any width stand for those of another.
    """
    wrong = []
    for name, tensor in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif tuple(found[name].shape) != tuple(tensor.shape):
            wrong.append(f"{name} is {_shown(found[name].shape)}, expected {_shown(tensor.shape)}")
        elif (dtype := found[name].dtype) != tensor.dtype and not (
            dtype.is_floating_point and tensor.is_floating_point()
        ):
            wrong.append(f"{name} is {dtype}, expected {tensor.dtype}")
    wrong += [f"{name[:80]!r} is not of it" for name in found if name not in expected]
    return "; ".join(wrong[:most]) + (f"; and {len(wrong) - most:,} more" if len(wrong) > most else "")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with infinity or what is not a number; None without one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _begin(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The checksum of what the header says of a tensor, which that of its bytes goes on from."""
    return zlib.crc32(f"{name} {_NAMES[dtype]} {list(shape)}".encode("utf-8", "surrogatepass"))


def _bytes(tensor: Tensor) -> Any:
    """Its bytes in order, as a buffer."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        values = parse_json(text.decode("utf-8"), f"the header of {file}")
    except UnicodeDecodeError as error:
        raise FileError(f"the header of {file} is not UTF-8 text") from error
    if not isinstance(values, dict):
        raise FileError(f"the header of {file} is no JSON object")
    return values


def _strings(values: Any, file: Path) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise FileError(f"the metadata of {file} are not strings by name")
    return values


def _stored(file: Path, name: str, values: Any, start: int) -> Stored:
    """A tensor as the header describes it, whose bytes must be as many as its shape says."""
    try:
        dtype, shape, (begin, end) = values["dtype"], values["shape"], values["data_offsets"]
        numbers = [begin, end, *shape]
        fits = all(type(number) is int and number >= 0 for number in numbers)
        fits = fits and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the header of {file} does not describe {name[:80]!r} as this version knows it") from error
    if not fits:
        raise FileError(f"the header of {file} gives {name[:80]!r} a shape and a place that do not belong together")
    return Stored(file, DTYPES[dtype], tuple(shape), start + begin)
