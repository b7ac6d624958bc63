"""Weights of 8 bits in the place of parameters: which there are, and how layers read them.

A module that knows how says which of its parameters may be such (`of_8_bits`). The parameter then is a buffer of int8
by the same name, beside one more, `<name>_scale`: so they are saved, moved and counted as buffers are.
"""

from torch import Tensor, nn

from ..ops.kit.packed import LARGEST, Packed, Weight, pack
from ..ops.kit.packed import NO_GRADIENT as NO_GRADIENT
from .roles import roles

SCALE = "_scale"


def weight_of(module: nn.Module, name: str) -> Weight:
    """A weight of a module, be it a parameter or of 8 bits."""
    scale = module._buffers.get(name + SCALE)
    if scale is None:
        return getattr(module, name)  # type: ignore[no-any-return]
    values = module._buffers[name]
    assert values is not None
    return Packed(values, scale)


def quantise(model: nn.Module) -> None:
    """Round the matrices of a model to 8 bits, in place: those that `layers.roles` does not have in float32, such as
    projections, experts and the head, unless that is the embedding. What remains is frozen.

    Raises:
        ValueError: its experts are spread over processes.
    """
    role, wanted = roles(model), dict(model.named_parameters())
    modules = dict(model.named_modules())
    for path, module in modules.items():  # before anything is changed
        if _may(module) and getattr(module, "group", None) is not None:
            raise ValueError(f"{path} is spread over several processes; weights of 8 bits are for one")
    for path, module in modules.items():
        for name in _may(module):
            full = f"{path}.{name}" if path else name
            if full not in wanted or role[full].float32 or not role[full].decays:
                continue
            values, scale = pack(wanted[full])
            delattr(module, name)
            module.register_buffer(name, values)
            module.register_buffer(name + SCALE, scale)
    model.requires_grad_(False)


def keep_scales(model: nn.Module) -> None:
    """Make scales float32 again after the rest of a model has become something else."""
    for module in model.modules():
        for name in packed_names(module):
            module._buffers[name + SCALE] = module._buffers[name + SCALE].float()  # type: ignore[union-attr]


def packed_names(module: nn.Module) -> list[str]:
    """Which of its own weights are of 8 bits."""
    return [name for name in _may(module) if name + SCALE in module._buffers]


def quantised(model: nn.Module) -> bool:
    """Whether a model has weights of 8 bits."""
    return any(packed_names(module) for module in model.modules())


def expect_full(model: nn.Module) -> None:
    """Of a model that is to be trained, exported or made into another.

    Raises:
        ValueError: it has weights of 8 bits.
    """
    if quantised(model):
        raise ValueError(NO_GRADIENT)


def misfit(tensors: dict[str, Tensor]) -> str | None:
    """What cannot be right of the tensors of a model by name: a scale that is negative, or the one level beyond."""
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE)
        if scale is not None and (bool((tensor < -LARGEST).any()) or bool((scale < 0).any())):
            return name
    return None


def _may(module: nn.Module) -> tuple[str, ...]:
    return getattr(type(module), "of_8_bits", ())  # of the class: what wraps a module may answer in its stead
