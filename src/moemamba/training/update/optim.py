"""The optimiser with its groups, and its state by parameter name."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...layers import roles
from ..config import TrainConfig
from .muon import Muon


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices and AdamW for all else, in groups by what decays.

    With `decay="matrices"` weights of two or more dimensions decay (projections, convolutions, experts, routers,
    embedding and head), but not `A_log`, `D`, biases and norms, as the authors of Mamba mark them. With "all", the
    recipe of MoE-Mamba, everything decays. What is what, `layers.roles` says.
    """
    muon, role = config.optimizer == "muon", roles(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        matrix, decays = muon and role[name].muon, config.decay == "all" or role[name].decays
        groups.setdefault((matrix, decays), []).append(parameter)
    # Fused, an update can be withheld by a flag on the device; see `guard.apply`.
    return (Muon if muon else torch.optim.AdamW)(
        [
            {"params": same_mesh, "weight_decay": config.weight_decay if decays else 0.0, "muon": matrix}
            for (matrix, decays), parameters in groups.items()
            for same_mesh in _by_mesh(parameters)
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded parameters of one mesh together, since one fused update cannot span two."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as "exp_avg.layers.0...": by name, so that it does not depend on groups or order."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        ValueError: a parameter's state is missing.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for place, value in tensors.items():
        key, name = place.split(".", 1)
        by_name.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if missing := [name for name in ordered if name not in by_name]:
        raise ValueError(f"the optimiser's state of {missing[0]} is missing")
    state = {index: by_name[name] for index, name in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
