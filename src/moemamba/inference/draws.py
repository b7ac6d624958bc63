"""Randomness by counting: a draw depends on its seed, its sample, its position and its token, and on nothing else."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1 << 20  # draws made at once, at most, unless a single position needs more
_GOLDEN = 0x9E3779B97F4A7C15


class Draws:
    """Exponential variables for each token of the vocabulary at each position of some rows.

    Args:
        seeds: (seed, sample) of each row; rows with the same two have the same draws.
        positions: of each row's first new token in its sequence.
        count: positions that follow one another.
    """

    def __init__(
        self,
        seeds: Sequence[tuple[int, int]],
        positions: Sequence[int],
        count: int,
        vocabulary: int,
        device: torch.device | str,
    ):
        key = _mixed(_mixed(_column(seed for seed, _ in seeds)) + _column(sample for _, sample in seeds))
        steps = np.arange(count, dtype=np.uint64)[:, None] + _column(positions)
        keys = _mixed(key + steps * np.uint64(_GOLDEN))  # (count, rows)
        halves = [part.astype(np.uint32).view(np.int32) for part in (keys, keys >> np.uint64(32))]
        self._low, self._high = (torch.from_numpy(half).to(device) for half in halves)
        self._tokens = torch.arange(vocabulary, dtype=torch.int32, device=device) * _int32(_GOLDEN >> 32)
        self._begin, self._made = 0, self._make(0)

    def at(self, step: int) -> Tensor:
        """(rows, vocabulary) float32, above 0."""
        if not self._begin <= step < self._begin + len(self._made):
            self._begin, self._made = step, self._make(step)
        return self._made[step - self._begin]

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self._low, self._high, self._made = self._low[:, rows], self._high[:, rows], self._made[:, rows]

    def _make(self, step: int) -> Tensor:
        """The draws of a step, and of as many after it as a block has room for."""
        last = step + max(1, BLOCK // (self._low.shape[1] * len(self._tokens)))
        x = self._low[step:last, :, None] + self._tokens
        _shifted_xor(x, 16).mul_(0x7FEB352D)  # lowbias32 of C. Wellons, with the other half of the key in between
        _shifted_xor(x, 15).bitwise_xor_(self._high[step:last, :, None]).mul_(_int32(0x846CA68B))
        _shifted_xor(x, 16)
        uniform = _logical_shift(x, 9).float().add_(0.5).mul_(2.0**-23)  # each exact in float32, and none 0 or 1
        return uniform.log_().neg_()


def _column(values: object) -> NDArray[np.uint64]:
    return np.array(list(values), dtype=np.uint64)  # type: ignore[call-overload]


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: each bit of a key changes about half of the bits of the result."""
    keys = keys + np.uint64(_GOLDEN)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _int32(bits: int) -> int:
    """The signed number of 32 bits, the lowest of `bits`."""
    return (bits & 0xFFFFFFFF) - ((bits & 0x80000000) << 1)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _shifted_xor(x: Tensor, bits: int) -> Tensor:
    """In place."""
    return x.bitwise_xor_(_logical_shift(x, bits))
