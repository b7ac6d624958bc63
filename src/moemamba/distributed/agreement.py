"""Which signal several processes stop for, without an exchange of its own."""

from collections import deque

import torch
from torch import Tensor

from ..host.stop import SIGNALS, Stop
from .processes import Processes

AHEAD = 2  # steps that a GPU may be given before the answer of an older one is read


class Agreement:
    """What each process has been told travels in the sum that every step makes anyway; all act at the same step.

    On GPUs the answer is read `AHEAD` steps later, so that no step waits for it. One process has nobody to ask, and
    its steps (which may be captured) know nothing of signals.
    """

    def __init__(self, signals: Stop, processes: Processes):
        self.signals, self.processes = signals, processes
        self._none = torch.zeros(len(SIGNALS), device=processes.device)
        self._answers: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def flags(self) -> list[Tensor]:
        """For the sum of a step: (signals,) float32, 1 for the one that this process has received."""
        if self.processes.size == 1:
            return []
        if not self.signals.number:
            return [self._none]
        return [torch.tensor([float(each == self.signals.number) for each in SIGNALS], device=self._none.device)]

    def hear(self, summed: Tensor) -> None:
        """Take the sum of all processes' flags."""
        if summed.device.type == "cpu":
            self._answers.append((summed, None))
            return
        here = torch.empty(summed.shape, pin_memory=True).copy_(summed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._answers.append((here, arrived))

    def number(self) -> int:
        """After a step: the signal that all stop for, the same in all; 0 if there is none."""
        if self.processes.size == 1:
            return self.signals.number
        if len(self._answers) <= (0 if self._none.device.type == "cpu" else AHEAD):
            return 0
        answer, arrived = self._answers.popleft()
        if arrived is not None:
            arrived.synchronize()
        return next((number for number, count in zip(SIGNALS, answer.tolist(), strict=True) if count), 0)
