"""The linear layers that layers are built of."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.arguments import autocasts
from .norm import norm_alone
from .plain import plain, weights_alone


class Linear(nn.Linear):
    """PyTorch's module over `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., f); a bias that is kept in float32 where the weight is not is rounded. A weight that is
        makes what it meets float32."""
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != self.weight.dtype:
            bias = bias.to(self.weight.dtype)
        return ops.linear(_as_read(input, self.weight), self.weight, bias)


def in_halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`layer(x)` cut in two along its last dimension: (..., d) -> (..., f / 2) twice.

    Where a GPU is to differentiate it, and the layer is what it was built as, by a product for each half: the gradients
    of the halves come from different kernels and would have to be copied next to each other for one product.
    """
    weights = weights_alone(layer, Linear, 1) if x.is_cuda and torch.is_grad_enabled() else ()
    if weights:
        first, second = weights[0].chunk(2)
        return ops.linear(x, first), ops.linear(x, second)
    first, second = layer(x).chunk(2, dim=-1)
    return first, second


def beside(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d) for whoever else reads it, and `layer(x)`.

    Where a GPU is to differentiate both, and the layer is what it was built as, x's two gradients are added on the way.
    """
    weights = weights_alone(layer, Linear, 1) if x.is_cuda and torch.is_grad_enabled() else ()
    return ops.linear_beside(x, *weights) if weights else (x, layer(x))


def before_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`layer(x)` before its bias is added, and the bias, for an op that adds it (and sums its gradient) in passing.

    With it, and None, where the layer is no longer what it was built as.
    """
    weights = weights_alone(layer, Linear, 2)
    return (ops.linear(_as_read(x, weights[0]), weights[0]), weights[1]) if weights else (layer(x), None)


def _as_read(x: Tensor, weight: Tensor) -> Tensor:
    """x as wide as a weight that is kept in float32 (`placing.placed`); autocast has a width of its own."""
    if x.dtype == weight.dtype or weight.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    return x if autocasts(x.device.type) else x.float()


def weights_of(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that still is what it was built as; None for any other."""
    return (layer.weight, layer.bias) if plain(layer, Linear) else None  # type: ignore[return-value]


def fusible_norm(norm: nn.Module, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and epsilon of a norm that a kernel may compute with the linear layers around it.

    None where there are no kernels for a step of x (b, 1, d) through these weights, or calling the norm may do more.
    """
    if torch.is_grad_enabled() or autocasts(x.device.type):
        return None
    if any(ops.choose("norm_linear", x, weight) == "reference" for weight in weights):
        return None
    return norm_alone(norm, x)
