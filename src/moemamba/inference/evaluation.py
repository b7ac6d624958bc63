"""A model as it computes in evaluation mode, whatever mode it is in: flags on a shared module are not touched."""

from types import MethodType

import torch
from torch import nn

from .. import ops
from ..layers.plain import why_not_plain
from ..model import MoEMamba, foreign_parts

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


def why_varies(model: MoEMamba) -> str | None:
    """Why a token's bits may depend on its batch, on how its prompt was cut or on the path; None where they do not."""
    weight = model.embedding.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}, where products round otherwise in another batch; move it to the CPU"
    for name, each in model.named_parameters():
        if each.dtype.is_floating_point and each.dtype != torch.float32:
            return f"{name} is {str(each.dtype).removeprefix('torch.')}; convert the model to float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, which computes in another type; leave it"
    if ops.choose("mamba_step", weight) != "cpu":
        return ops.why_not("cpu", "cpu") or "another backend is asked for; leave ops.backend"
    for name, kind in foreign_parts(model).items():
        return f"{name} is {kind}, which may compute anything"
    for name, module in model.named_modules():
        if reason := why_not_plain(module, type(module)):
            return f"{name or 'the model'} {reason}, which may compute anything"
    return None


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
