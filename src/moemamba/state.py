"""What a model remembers of the sequences it has seen, as a value: select, fork, move, save, load."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .host.files import FileError, expanded, parse_json
from .layers import LAYERS
from .tensors import Stored, TensorFile, not_finite, write_tensors

KINDS = {layer.state_kind: layer for layer in reversed(LAYERS.values()) if layer.state_type is not None}
"""a layer with each kind of state, by what files call that"""
STATES: dict[str, type[Any]] = {kind: layer.state_type for kind, layer in KINDS.items() if layer.state_type is not None}


@dataclass(frozen=True)
class State:
    """The state of each sequence mixer, bottom to top. Nothing changes it: calls return a new one.

    Each is a NamedTuple of tensors (b, ...), such as `layers.MambaState`.
    """

    mixers: tuple[Any, ...]

    @property
    def batch_size(self) -> int:
        """Rows; 0 of a model that remembers nothing."""
        return self.mixers[0][0].shape[0] if self.mixers else 0

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for mixer in self.mixers for tensor in mixer)

    def select(self, rows: Tensor | list[int] | slice) -> Self:
        """The state of some rows, in the order given; a row may be taken more than once."""
        return self._map(lambda tensor: tensor[rows])

    def fork(self, copies: int) -> Self:
        """Each row `copies` times, one after the other."""
        return self._map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def to(self, device: torch.device | str) -> Self:
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> Self:
        """The state cut off from the graph, for truncated back-propagation."""
        return self._map(Tensor.detach)

    def keep(self, rows: Tensor) -> "State":
        """The state in rows, (b,) or () bool; in the others the one before any token."""
        layers = {layer.state_type: layer for layer in KINDS.values()}
        return State(tuple(layers[type(mixer)].keep(mixer, rows) for mixer in self.mixers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, with checksums, beside and renamed, so that a reader never sees half of it.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        write_tensors(expanded(path), *pack(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no saved state, or is damaged.
            OSError: the system cannot read it.
        """
        try:
            stored = TensorFile(expanded(path))
            _kinds(stored, stored.metadata)
            stored.verify()
            found = unpack(stored, stored.metadata)
            if strange := not_finite(pack(found)[0]):
                raise FileError(f"{strange} is not finite")
        except FileError as error:
            raise FileError(
                f"{path} holds no complete saved state ({error}); write it again with State.save"
            ) from error
        return cls(found.to(device).mixers)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(tuple(type(mixer)(*map(function, mixer)) for mixer in self.mixers))


def pack(state: State) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state as tensors by name, and what a file says of them besides."""
    tensors = {
        f"{index}.{name}": getattr(mixer, name) for index, mixer in enumerate(state.mixers) for name in mixer._fields
    }
    names = {kind_of_state: kind for kind, kind_of_state in STATES.items()}
    return tensors, {"mixers": json.dumps([names[type(mixer)] for mixer in state.mixers])}


def unpack(stored: Mapping[str, Stored], said: Mapping[str, str]) -> State:
    """The state that `pack` has taken apart, from a file.

    Raises:
        FileError: it is none, or its tensors do not belong together.
    """
    mixers = []
    for index, kind in enumerate(_kinds(stored, said)):
        names = STATES[kind]._fields
        mixers.append(STATES[kind](*(stored[f"{index}.{name}"][...] for name in names)))
    return State(tuple(mixers))


def _kinds(stored: Mapping[str, Stored], said: Mapping[str, str]) -> list[str]:
    """The mixers of a saved state, whose tensors are of shapes and dtypes that belong together.

    Raises:
        FileError: it is none, or they are not.
    """
    kinds = parse_json(said.get("mixers", "null"), "its list of mixers")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
        raise FileError("it does not say which mixers it is of")
    fields = {f"{index}.{name}" for index, kind in enumerate(kinds) for name in STATES[kind]._fields}
    if fields != stored.keys():
        raise FileError(f"{min(fields ^ stored.keys())[:80]!r} is missing, or should not be there")
    rows = {tensor.shape[:1] for tensor in stored.values()}
    fit = len(rows) < 2
    for index, kind in enumerate(kinds):
        own = [stored[f"{index}.{name}"] for name in STATES[kind]._fields]
        fit = fit and KINDS[kind].fit(*own)
    if not fit:
        raise FileError("its tensors have shapes or dtypes that do not belong together")
    return kinds


# What takes a call apart into tensors (torch.export, torch.func) knows a state as one of them.
torch.export.register_dataclass(State, serialized_type_name="moemamba.State")
