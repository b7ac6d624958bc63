"""The linear layers that layers are built of."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.arguments import autocasts
from ..ops.kit.packed import Weight
from .norm import norm_alone
from .plain import plain, weights_alone
from .quantised import packed_names, weight_of


class Linear(nn.Linear):
    """PyTorch's module over `ops.linear`."""

    of_8_bits = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., f); a bias that is kept in float32 where the weight is not is rounded. A weight that is
        makes what it meets float32."""
        bias: Tensor | None = self.bias
        weight = weight_of(self, "weight")
        if bias is not None and isinstance(weight, Tensor) and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        return ops.linear(_as_read(input, weight), weight, bias)


def in_halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`layer(x)` cut in two along its last dimension: (..., d) -> (..., f / 2) twice.

    Where a GPU is to differentiate it, and the layer is what it was built as, by a product for each half: the gradients
    of the halves come from different kernels and would have to be copied next to each other for one product.
    """
    weights = weights_alone(layer, Linear, 1) if x.is_cuda and torch.is_grad_enabled() else ()
    if weights and isinstance(weights[0], Tensor):
        first, second = weights[0].chunk(2)
        return ops.linear(x, first), ops.linear(x, second)
    first, second = layer(x).chunk(2, dim=-1)
    return first, second


def beside(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d) for whoever else reads it, and `layer(x)`.

    Where a GPU is to differentiate both, and the layer is what it was built as, x's two gradients are added on the way.
    """
    weights = weights_alone(layer, Linear, 1) if x.is_cuda and torch.is_grad_enabled() else ()
    return ops.linear_beside(x, weights[0]) if weights and isinstance(weights[0], Tensor) else (x, layer(x))


def before_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`layer(x)` before its bias is added, and the bias, for an op that adds it (and sums its gradient) in passing.

    With it, and None, where the layer is no longer what it was built as.
    """
    weights = weights_alone(layer, Linear, 2)
    if not weights:
        return layer(x), None
    weight, bias = weights
    assert isinstance(bias, Tensor)
    return ops.linear(_as_read(x, weight), weight), bias


def _as_read(x: Tensor, weight: Weight) -> Tensor:
    """x as wide as a weight that is kept in float32 (`placing.placed`); autocast has a width of its own."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if not narrow or not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        return x
    return x if autocasts(x.device.type) else x.float()


def weights_of(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that still is what it was built as; None for any other, and for weights of 8 bits."""
    return (layer.weight, layer.bias) if plain(layer, Linear) and not packed_names(layer) else None  # type: ignore[return-value]


def fusible_norm(norm: nn.Module, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and epsilon of a norm that a kernel may compute with the linear layers around it.

    None where there are no kernels for a step of x (b, 1, d) through these weights, or calling the norm may do more.
    """
    if torch.is_grad_enabled() or autocasts(x.device.type):
        return None
    if any(ops.choose("norm_linear", x, weight) == "reference" for weight in weights):
        return None
    return norm_alone(norm, x)
