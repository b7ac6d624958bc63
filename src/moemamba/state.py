"""What a model remembers of the sequences it has seen, as a value: select, fork, move, save, load."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .host.files import expanded
from .layers import AttentionState, MambaState

MixerState = MambaState | AttentionState
KINDS: dict[str, type[MambaState] | type[AttentionState]] = {"mamba": MambaState, "attention": AttentionState}


@dataclass(frozen=True)
class State:
    """The state of each sequence mixer, bottom to top. Nothing changes it: calls return a new one."""

    mixers: tuple[MixerState, ...]

    @property
    def batch_size(self) -> int:
        """Rows."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, beside and renamed, so that a reader never sees half of it."""
        tensors = {
            f"{index}.{name}": getattr(mixer, name).detach().contiguous()
            for index, mixer in enumerate(self.mixers)
            for name in mixer._fields
        }
        kinds = ["attention" if isinstance(mixer, AttentionState) else "mamba" for mixer in self.mixers]
        target = expanded(os.fspath(path))
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file(tensors, beside, metadata={"mixers": json.dumps(kinds)})
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no saved state, or is damaged.
        """
        try:
            with safe_open(expanded(os.fspath(path)), framework="pt", device=str(device)) as file:
                kinds = json.loads((file.metadata() or {})["mixers"])
                mixers = tuple(
                    KINDS[kind](*(file.get_tensor(f"{index}.{name}") for name in KINDS[kind]._fields))
                    for index, kind in enumerate(kinds)
                )
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} holds no complete saved state ({error}); write it again with State.save"
            ) from error
        return cls(mixers)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(tuple(type(mixer)(*map(function, mixer)) for mixer in self.mixers))
