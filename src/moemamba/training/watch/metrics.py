"""What a run measures about itself between two lines of metrics.jsonl."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from ...counting import flops_per_token
from ...layers import RouterStats
from ..config import TrainConfig

# A step's measures: language loss, auxiliary loss, then the fields of every router's statistics.
Measures = list[Tensor]


def measures(language: Tensor, auxiliary: Tensor, router: tuple[RouterStats, ...]) -> Measures:
    """One flat list, so that sums over steps are one launch on a GPU."""
    return [value.detach() for value in (language, auxiliary, *(value for stats in router for value in stats))]


def add(total: Measures, more: Measures) -> Measures:
    """Elementwise sum; an empty `total` is zero."""
    return list(torch._foreach_add(total, more)) if total else more


def router_stats(values: Measures) -> tuple[RouterStats, ...]:
    """The routers' part of measures or of their sums."""
    width = len(RouterStats._fields)
    return tuple(RouterStats(*values[first : first + width]) for first in range(2, len(values), width))


class Meter:
    """Sums of measures since the last line. They stay on the device: only reading waits for it.

    Args:
        names: of the routers.
        seconds: of work before this process.
        peak: what the devices of the run could compute at most, operations a second; None if unknown.
    """

    def __init__(self, config: TrainConfig, names: tuple[str, ...], seconds: float, peak: float | None = None):
        self.config, self.names, self.peak = config, names, peak
        self.origin = time.perf_counter() - seconds
        self.restart()

    def restart(self) -> None:
        """Begin the next line."""
        self.steps = 0
        self._last: Measures = []
        self._sums: Tensor | float = 0.0  # of the steps that were not skipped, one vector
        self.since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of work since the run began."""
        return time.perf_counter() - self.origin

    def add(self, values: Measures, norm: Tensor, failed: Tensor) -> None:
        """Take in a step: its means over the batch (sums of load), the gradient's norm before clipping, and whether
        its update was withheld: then it does not count."""
        self.steps += 1
        flat = torch.cat([*(value.reshape(-1) for value in values), norm.reshape(1)])
        self._last, self._sums = values, self._sums + torch.where(failed, 0, flat)

    def _read(self) -> tuple[Measures, Tensor]:
        """Sums of the measures, and of the norms."""
        assert isinstance(self._sums, Tensor)
        *parts, norm = self._sums.split([*(value.numel() for value in self._last), 1])
        return [part.view_as(value) for part, value in zip(parts, self._last, strict=True)], norm

    def train_line(self, step: int, rate: float, skipped: int = 0) -> dict[str, Any]:
        """What metrics.jsonl says about the steps since the last line; means are over those not skipped."""
        sums, norm = self._read()
        language, auxiliary = (value.item() / (self.steps - skipped) for value in sums[:2])
        tokens = self.config.batch_size * self.config.context
        speed = self.steps * tokens / (time.perf_counter() - self.since)
        line = {
            "step": step,
            "tokens": step * tokens,
            "loss": language,
            "auxiliary": auxiliary,
            "learning_rate": rate,
            "grad_norm": norm.item() / (self.steps - skipped),
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.seconds, 3),
        }
        if skipped:
            line["skipped"] = skipped
        if self.peak is not None:
            # Forward and backward; what recomputing adds is no use of the model's and does not count.
            line["mfu"] = round(3 * flops_per_token(self.config.model, self.config.context) * speed / self.peak, 4)
        if norm.device.type == "cuda":
            line["peak_memory"] = torch.cuda.max_memory_allocated(norm.device)
        return line

    def router_line(self, step: int, skipped: int = 0) -> dict[str, Any]:
        """The same about every router: means over the steps; dead experts had no token in all of them."""
        layers = []
        steps = self.steps - skipped
        for name, stats in zip(self.names, router_stats(self._read()[0]), strict=True):
            load = (stats.load / stats.load.sum()).tolist()
            layers.append(
                {
                    "name": name,
                    "load": [round(share, 5) for share in load],
                    "entropy": stats.entropy.item() / steps,
                    "max_entropy": math.log(len(load)),
                    "dropped": stats.dropped.item() / steps,
                    "balance": stats.balance_loss.item() / steps,
                    "dead": load.count(0.0),
                }
            )
        return {"step": step, "layers": layers}
