"""The linear layers that layers are built of."""

from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """PyTorch's module over `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., f)."""
        return ops.linear(input, self.weight, self.bias)
