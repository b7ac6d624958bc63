"""The projection to the vocabulary."""

import torch
from torch import Tensor

from .. import ops
from .linear import Linear
from .quantised import weight_of


class Head(Linear):
    """The projection to the vocabulary; with targets, straight to the loss, without ever holding the logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """(b, l, d) -> logits (b, l, v), or the mean cross-entropy against targets (b, l)."""
        if targets is None:
            return super().forward(input)
        hidden, weight = input.flatten(0, 1), weight_of(self, "weight")
        if self.bias is not None:  # a column more, that meets a one
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
            weight = torch.cat([ops.unpacked(weight, self.bias.dtype), self.bias[:, None]], 1)
        total = ops.linear_cross_entropy(hidden, weight, targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)  # 0 where nothing counts, which adds nothing to a mean
