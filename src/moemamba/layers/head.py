"""The projection to the vocabulary."""

from torch import Tensor

from .. import ops
from .linear import Linear


class Head(Linear):
    """The projection to the vocabulary; with targets, straight to the loss, without ever holding the logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """(b, l, d) -> logits (b, l, v), or the mean cross-entropy against targets (b, l)."""
        if targets is None:
            return super().forward(input)
        total = ops.linear_cross_entropy(input.flatten(0, 1), self.weight, targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)  # 0 where nothing counts, which adds nothing to a mean
