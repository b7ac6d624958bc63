"""A model as it computes in evaluation mode, whatever mode it is in: flags on a shared module are not touched."""

from types import MethodType

from torch import nn

from ..model import MoEMamba

NOT_FINITE = (
    "the model's output is not finite (infinity, or not a number) after {} new tokens: its weights are damaged, or its "
    "training diverged; take another checkpoint"
)


def in_evaluation(model: MoEMamba) -> MoEMamba:
    """The same model, in evaluation mode: parameters, buffers and hooks are its own, and changes to them are seen.

    What is set on the modules themselves stays theirs: other threads may train the model, or change its mode.
    """
    views: dict[int, nn.Module] = {}
    view = _view(getattr(model, "_orig_mod", model), views)  # under what torch.compile wraps around it
    assert isinstance(view, MoEMamba)
    return view


def _view(module: nn.Module, views: dict[int, nn.Module]) -> nn.Module:
    """A module with the same contents, but a mode of its own, and children that are such views too."""
    if (known := views.get(id(module))) is not None:
        return known
    view = views[id(module)] = object.__new__(type(module))
    own = view.__dict__
    own.update(module.__dict__)
    own["training"] = False
    own["_compiled_call_impl"] = None  # it is bound to the module, and so to its mode
    forward = own.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        own["forward"] = MethodType(forward.__func__, view)
    own["_modules"] = {name: child and _view(child, views) for name, child in module._modules.items()}
    return view
