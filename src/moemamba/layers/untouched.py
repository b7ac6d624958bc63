"""Whether a module still is what it was built as, so that its arithmetic may be done elsewhere."""

from torch import Tensor, nn
from torch.nn.modules import module as _modules


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a layer still is no more than what its class does: nothing replaced, wrapped or hooked."""
    return (
        type(layer) is kind
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        and not (_modules._global_forward_hooks or _modules._global_forward_pre_hooks)
    )


def weights_alone(layer: nn.Module, kind: type[nn.Module], count: int) -> tuple[Tensor, ...]:
    """The `count` parameters of an untouched layer; nothing if it is not, or has another number of them."""
    if not untouched(layer, kind):
        return ()
    given = [parameter for parameter in layer._parameters.values() if parameter is not None]
    return tuple(given) if len(given) == count else ()
