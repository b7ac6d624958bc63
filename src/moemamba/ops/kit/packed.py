"""Weights of 8 bits: rows of a matrix as whole numbers, with one float32 a row that they are multiples of."""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
NO_GRADIENT = (
    "weights of 8 bits are for generation: they cannot be trained, exported or made into another model; "
    "load the model that they were made of, without weights='int8'"
)


class Packed(NamedTuple):
    """A matrix, or a stack of them, which `linear` and the experts take in the place of a tensor.

    On a CPU kernels read it as it is; elsewhere it is made `dense` first. It has no gradients.
    """

    values: Tensor
    """(..., f, d) int8"""
    scale: Tensor
    """(..., f) float32"""

    @property
    def shape(self) -> torch.Size:
        """That of the matrix, (..., f, d)."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.scale.device

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., f, d) the weights that it stands for."""
        return (self.values.to(self.scale.dtype) * self.scale[..., None]).to(dtype)


Weight = Tensor | Packed


def pack(weight: Tensor) -> Packed:
    """Round a matrix (..., f, d): each row to 255 levels between its largest entry and the opposite."""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1) / LARGEST if weight.shape[-1] else weight.new_zeros(weight.shape[:-1])
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return Packed((weight * inverse[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale)


def unpacked(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor; one of 8 bits in this dtype."""
    return weight.dense(dtype) if isinstance(weight, Packed) else weight
