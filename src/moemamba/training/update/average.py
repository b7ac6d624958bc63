"""Averaged weights: an exponential moving average of a run's parameters, which often predicts better than the last."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...distributed import own_part, refresh


class Average:
    """`average = keep * average + (1 - keep) * parameter` after every step, for each parameter, in float32.

    `keep` is `decay`, but in the beginning (1 + step) / (10 + step) where that is less, so that the initial weights
    are soon forgotten (the ramp of TensorFlow's ExponentialMovingAverage). It depends on the step alone: a resumed run
    has the bits of one that never stopped. A step whose update is withheld counts as one that changes nothing.

    A shared out parameter's average is shared out as it is. Buffers have none: they are the model's own.

    Args:
        model: on its device, with the weights that the average begins with.
        decay: such as 0.999, which averages over about the last 1,000 steps.
    Attributes:
        tensors: the averages by the parameters' names, tied ones once.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self._parameters = dict(model.named_parameters())
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Forget everything but the parameters as they are now."""
        for name, parameter in self._parameters.items():
            own_part(self.tensors[name]).copy_(own_part(parameter))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps. On a GPU a few launches, for which the host waits for nothing."""
        keep = min(self.decay, (1 + step) / (10 + step))
        averages = [own_part(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(averages, [own_part(each) for each in self._parameters.values()], 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights, in the memory of its own, as to evaluate them."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():  # one after another: no second copy of the model
            own, other = own_part(parameter), own_part(self.tensors[name])
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
        refresh(self.model)

    def model_tensors(self) -> dict[str, Tensor]:
        """All that `checkpoint.model_tensors` has of a model with the averaged weights."""
        return self.tensors | {name: buffer.detach() for name, buffer in self.model.named_buffers()}
