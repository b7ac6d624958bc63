"""Linear layers, and whether one still is what it was built as."""

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from .. import ops


class Linear(nn.Linear):
    """PyTorch's module over `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., f)."""
        return ops.linear(input, self.weight, self.bias)


def weights_alone(layer: nn.Module, kind: type[nn.Module], count: int) -> tuple[Tensor, ...]:
    """A layer's `count` parameters, if calling it depends on nothing else: it is of this very class, unwrapped and
    unhooked. Otherwise nothing."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    if type(layer) is not kind or hooked or _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
        return ()
    given = [parameter for parameter in layer._parameters.values() if parameter is not None]
    return tuple(given) if len(given) == count else ()
