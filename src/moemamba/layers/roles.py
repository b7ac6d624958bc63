"""What each parameter is for: what optimisers, precision and initialisation ask, in place of its name."""

from typing import NamedTuple

from torch import Tensor, nn


class Role(NamedTuple):
    """What is done with a parameter."""

    decays: bool = True
    """by weight decay, where not everything does"""
    muon: bool = True
    """a matrix between hidden layers, or (..., rows, columns) a stack of them: Muon may make its update orthogonal"""
    float32: bool = False
    """read in float32 whatever the precision of products"""
    writes_residual: bool = False
    """its products are the output of the module that is asked"""
    fan_in: int | None = None
    """that MoE-Mamba's initialisation counts; None where it leaves the parameter as the layer draws it"""


MATRIX = Role()
VECTOR = Role(decays=False, muon=False, float32=True)
"""acts on channels one by one"""


def by_shape(parameter: Tensor) -> Role:
    """Of a parameter about which nothing else is known."""
    return MATRIX._replace(float32=True) if parameter.ndim >= 2 else VECTOR


def roles(module: nn.Module) -> dict[str, Role]:
    """The role of each parameter by its name in the module: as it says itself (`roles()`), or `composed`."""
    own = getattr(type(module), "roles", None)  # of the class: what wraps a module may answer in its stead
    if own is not None:
        return own(module)  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear):
        return {name: linear(parameter) for name, parameter in module.named_parameters(recurse=False)}
    return composed(module)


def composed(module: nn.Module, *writers: str) -> dict[str, Role]:
    """What the children say, and of the module's own parameters what their shapes say.

    Args:
        writers: children whose output is the module's.
    """
    found = {name: by_shape(parameter) for name, parameter in module.named_parameters(recurse=False)}
    for child, inner in module.named_children():
        for name, role in roles(inner).items():
            found[f"{child}.{name}"] = role if child in writers else role._replace(writes_residual=False)
    return found


def linear(parameter: Tensor) -> Role:
    """Of a linear layer."""
    matrix = parameter.ndim >= 2
    return Role(decays=matrix, muon=matrix, writes_residual=matrix)
