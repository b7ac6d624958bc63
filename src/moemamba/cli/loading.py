"""How a model is loaded: options that several commands share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from ..model import MoEMamba
    from ..text import Tokenizer


@dataclass(frozen=True)
class Loading:
    """Where a model goes, and in which weights."""

    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    weights: Literal["int8"] | None = None
    """int8 rounds the matrices to 8 bits, which makes answers faster on a CPU and needs a quarter of the memory; as the
    model was saved if None"""

    def load(self, run: "str | Path") -> "tuple[MoEMamba, Tokenizer]":
        """The model of a run and its tokenizer."""
        from ..checkpoint import load

        return load(run, self.device, weights=self.weights)
