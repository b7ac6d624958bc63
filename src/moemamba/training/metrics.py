"""What a run measures about itself between two lines of metrics.jsonl."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from ..layers import RouterStats
from .config import TrainConfig

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
    """

    def __init__(self, config: TrainConfig, names: tuple[str, ...], seconds: float):
        self.config, self.names = config, names
        self.origin = time.perf_counter() - seconds
        self.failure = torch.tensor(math.inf)
        self.restart()

    def restart(self) -> None:
        """Begin the next line."""
        self.steps = 0
        self.sums: Measures = []
        self.since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of work since the run began."""
        return time.perf_counter() - self.origin

    def add(self, step: int, values: Measures, norm: Tensor) -> None:
        """Take in a step: its means over the batch (sums of load), and the gradient's norm before clipping."""
        self.steps += 1
        self.sums, self.norm = add(self.sums, values), norm
        failed = ~(values[0] + values[1] + norm).isfinite()
        self.failure = torch.minimum(self.failure.to(norm.device), torch.where(failed, step, math.inf))

    def first_failure(self) -> int | None:
        """The first step whose loss or gradient was not finite."""
        return None if self.failure.isinf() else int(self.failure)

    def train_line(self, step: int, rate: float) -> dict[str, Any]:
        """What metrics.jsonl says about the steps since the last line."""
        language, auxiliary = (value.item() / self.steps for value in self.sums[:2])
        tokens = self.config.batch_size * self.config.context
        return {
            "step": step,
            "tokens": step * tokens,
            "loss": language,
            "auxiliary": auxiliary,
            "learning_rate": rate,
            "grad_norm": self.norm.item(),
            "tokens_per_second": round(self.steps * tokens / (time.perf_counter() - self.since), 1),
            "seconds": round(self.seconds, 3),
        }

    def router_line(self, step: int) -> dict[str, Any]:
        """The same about every router: means over the steps; dead experts had no token in all of them."""
        layers = []
        for name, stats in zip(self.names, router_stats(self.sums), strict=True):
            load = (stats.load / stats.load.sum()).tolist()
            layers.append(
                {
                    "name": name,
                    "load": [round(share, 5) for share in load],
                    "entropy": stats.entropy.item() / self.steps,
                    "max_entropy": math.log(len(load)),
                    "dropped": stats.dropped.item() / self.steps,
                    "balance": stats.balance_loss.item() / self.steps,
                    "dead": load.count(0.0),
                }
            )
        return {"step": step, "layers": layers}
