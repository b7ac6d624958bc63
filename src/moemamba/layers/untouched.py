"""Whether a module still is what it was built as, so that its arithmetic may be done elsewhere."""

from torch import nn
from torch.nn.modules import module as _modules


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a layer still is no more than what its class does: nothing replaced, wrapped or hooked."""
    return (
        type(layer) is kind
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        and not (_modules._global_forward_hooks or _modules._global_forward_pre_hooks)
    )
