"""Whether a module still is what it was built as, so that its arithmetic may be done elsewhere.

Elsewhere means: by an op that reads the module's parameters, or those of several, without calling it. Whoever asks gets
a reason, in words. A direct call asks each time, so asking is cheap. Weights of 8 bits are of the kinds it is built of.
"""

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from ..ops.kit.packed import Weight
from .quantised import packed_names, weight_of

_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
_GLOBAL_HOOKS = {
    "_global_forward_hooks": "a forward hook on all modules",
    "_global_forward_pre_hooks": "a forward pre-hook on all modules",
    "_global_backward_hooks": "a backward hook on all modules",
    "_global_backward_pre_hooks": "a backward pre-hook on all modules",
}
_TENSORS = (nn.Parameter, Tensor)  # a Tensor is in the place of one under `torch.func.functional_call`


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why calling a module may do more than its class does: replaced, wrapped, hooked, with weights of another kind.

    Of its children nothing is said: whoever reads their weights asks for them too.

    Returns:
        the reason, "has a forward hook"; None if the module is plain.
    """
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    state = module.__dict__
    if "forward" in state:
        return "has a forward of its own"
    for name, what in _HOOKS.items():
        if state[name]:
            return f"has {what}"
    for name, what in _GLOBAL_HOOKS.items():
        if getattr(_modules, name):
            return f"has {what}"
    for name, parameter in state["_parameters"].items():
        if parameter is not None and type(parameter) not in _TENSORS:
            return f"has a {type(parameter).__name__} as its {name}"
    return None


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module still is no more than what its class does."""
    return type(module) is kind and "forward" not in module.__dict__ and unhooked(module)


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is no more than calling its forward, on plain parameters."""
    state = module.__dict__
    if (  # `why_not_plain` in one breath, since this is asked of every layer for every token
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    ):
        return False
    for parameter in state["_parameters"].values():
        if parameter is not None and type(parameter) not in _TENSORS:
            return False
    return True


def reasons(model: nn.Module) -> dict[str, str]:
    """What keeps modules of a model from their fastest path, by name: "layers.0.norm" -> "has a forward hook".

    Besides what `why_not_plain` says these are options that the kernel of a layer's step knows nothing of.
    """
    found = {}
    for name, module in model.named_modules():
        fused = getattr(module, "why_not_fused", None)
        reason = why_not_plain(module, type(module)) or (fused() if fused else None)
        if reason:
            found[name or "the model"] = reason
    return found


def weights_alone(layer: nn.Module, kind: type[nn.Module], count: int) -> tuple[Weight, ...]:
    """The `count` parameters of a plain layer, a weight of 8 bits first; nothing if it is not plain, or has another
    number of them."""
    if not plain(layer, kind):
        return ()
    given: list[Weight] = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if layer._buffers:
        given = [weight_of(layer, name) for name in packed_names(layer)] + given
    return tuple(given) if len(given) == count else ()
