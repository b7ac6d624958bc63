"""Updates that must not happen: a loss or gradient that is not finite, or a gradient far above what is usual."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...distributed import divide_gradients
from ...reading import validate
from ..config import TrainConfig

WINDOW = 100  # norms that the median is taken of
ENOUGH = 20  # norms without which nothing is called a spike


class Diverged(ArithmeticError):
    """The loss or its gradient failed; the run stopped, its checkpoints are good."""


class Failed(NamedTuple):
    """A step whose update was withheld."""

    step: int
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            return f"the gradient's norm is {self.grad_norm:.3g}, a spike, at step {self.step:,}"
        return f"the loss or its gradient is not finite at step {self.step:,}"


@dataclass
class Skips:
    """What of a guard is saved with a checkpoint."""

    in_all: int = 0
    """steps that were skipped"""
    in_a_row: int = 0
    """the last ones"""
    norms: list[float] = field(default_factory=list)
    """of the last gradients that were applied, oldest first; kept only to find spikes"""

    def __post_init__(self) -> None:
        validate(self, not_negative=("in_all", "in_a_row"))
        if len(self.norms) > WINDOW:
            raise ValueError(f"norms are {len(self.norms)}, more than {WINDOW}")


class Guard:
    """Decides on the device, without waiting for it, which updates apply; the host reads that every so often.

    Args:
        state: of the checkpoint that the run goes on from.
    """

    def __init__(self, config: TrainConfig, device: torch.device, state: Skips):
        self.config = config
        self.in_all, self.in_a_row = state.in_all, state.in_a_row
        self._steps: list[int] = []
        self._seen: list[Tensor] = []  # (3,) loss, norm, whether it failed: one a step since the last reading
        norms = torch.tensor(state.norms, dtype=torch.float32, device=device)
        # A ring: the newest norm is at (count - 1) % WINDOW, and what is not filled is infinite.
        self._norms = torch.full((WINDOW,), math.inf, device=device).index_copy(
            0, torch.arange(len(norms), device=device), norms
        )
        self._count = torch.tensor(len(norms), device=device)

    def check(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step fails: () bool on the device. Changes its own tensors in place, so that it can be captured.

        Args:
            loss: () what was minimised.
            norm: () of the gradient, before clipping. Several processes must pass the same values.
        """
        failed = ~(loss + norm).isfinite()
        if self.config.spike_factor is not None:
            known = self._count.clamp(max=WINDOW)
            middle = ((known - 1).clamp(min=0) // 2)[None]
            median = self._norms.sort().values.gather(0, middle).squeeze(0)
            failed = failed | ((known >= ENOUGH) & (norm > self.config.spike_factor * median))
            here = torch.arange(WINDOW, device=norm.device) == self._count % WINDOW
            self._norms.copy_(torch.where(here & ~failed, norm, self._norms))
            self._count += ~failed
        return failed

    def note(self, step: int, loss: Tensor, norm: Tensor, failed: Tensor) -> None:
        """Remember what `check` said of a step until the next reading."""
        self._steps.append(step)
        self._seen.append(torch.stack([loss, norm, failed.to(norm.dtype)]))

    def read(self) -> list[Failed]:
        """The steps that failed since the last reading; waits for the device.

        Raises:
            Fatal: the run must stop, by `on_failure` and `max_skips`.
        """
        values = torch.stack(self._seen).tolist() if self._seen else []
        steps, self._steps, self._seen = self._steps, [], []
        found: list[Failed] = []
        for step, (loss, norm, failed) in zip(steps, values, strict=True):
            self.in_a_row = self.in_a_row + 1 if failed else 0
            if failed:
                self.in_all += 1
                found.append(Failed(step, loss, norm))
                if self.config.on_failure == "stop" or self.in_a_row >= self.config.max_skips:
                    raise Fatal(found)
        return found

    def state(self) -> Skips:
        """What to save."""
        count, norms = int(self._count), self._norms.tolist()
        oldest = count % WINDOW
        ordered = norms[oldest:] + norms[:oldest] if count >= WINDOW else norms[:count]
        return Skips(self.in_all, self.in_a_row, ordered)


class Fatal(Exception):
    """From `Guard.read`: failed steps, the last of which stops the run."""

    def __init__(self, failed: Sequence[Failed]):
        super().__init__(str(failed[-1]))
        self.failed = failed


def apply(optimizer: torch.optim.Optimizer, failed: Tensor, scale: Tensor) -> None:
    """A step of the optimiser with gradients divided by `scale`, () float32, unless `failed`, () bool.

    The fused update does both: gradients need no pass of their own, and on GPUs the host need not wait to know.
    """
    if optimizer.defaults.get("fused"):
        values: Any = optimizer
        values.grad_scale, values.found_inf = scale, failed.float()
        optimizer.step()
    elif not failed:
        divide_gradients((each for group in optimizer.param_groups for each in group["params"]), scale)
        optimizer.step()
