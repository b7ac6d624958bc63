"""The optimiser with its groups, and its state by parameter name."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...layers import roles
from ...layers.quantised import expect_full
from ..config import TrainConfig
from .muon import Muon


def make_optimizer(
    model: nn.Module,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    decay: Literal["matrices", "all"] = "matrices",
    betas: tuple[float, float] = (0.9, 0.95),
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices and AdamW for all else, in groups by what decays and by its rate.

    For a `MoEMamba`, and for any module that has our layers or others in it.

    With `decay="matrices"` weights of two or more dimensions decay (projections, convolutions, experts, routers,
    embedding and head), but not `A_log`, `D`, biases and norms, as the authors of Mamba mark them. With "all", the
    recipe of MoE-Mamba, everything decays. What is what, `layers.roles` says.

    Args:
        rates: factors of the learning rate by the names of modules and parameters, with the wildcards of a shell:
            {"embedding": 0.1, "*.router": 3, "layers.0.*.A_log": 0}; the last that fits counts, 0 leaves weights as
            they are. A schedule of your own sets `group["lr"]` to the rate times `group["factor"]`.
    Raises:
        ValueError: a name of `rates` fits no parameter, a factor is no number from 0 up, or weights have 8 bits.
    """
    expect_full(model)
    muon, role = optimizer == "muon", roles(model)
    factors = factors_of([name for name, _ in model.named_parameters()], rates or {})
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix, decays = muon and role[name].muon, decay == "all" or role[name].decays
        groups.setdefault((matrix, decays, factors[name]), []).append(parameter)
    # Fused, an update can be withheld by a flag on the device; see `guard.apply`.
    return (Muon if muon else torch.optim.AdamW)(
        [
            {
                "params": same_mesh,
                "lr": learning_rate * factor,
                "weight_decay": weight_decay if decays else 0.0,
                "muon": matrix,
                "factor": factor,
            }
            for (matrix, decays, factor), parameters in groups.items()
            for same_mesh in _by_mesh(parameters)
        ],
        lr=learning_rate,
        betas=betas,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimiser of a run."""
    return make_optimizer(
        model,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        decay=config.decay,
        betas=(config.beta1, config.beta2),
        rates=config.rates,
    )


def factors_of(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter's learning rate, 1 where no name of `rates` fits; raises ValueError if one never
    does."""
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in rates.items():
        found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not found:
            some = ", ".join(names[:: max(1, len(names) // 3)][:3])
            raise ValueError(f"rates names {pattern!r}, which fits no parameter; these are {some} and so on")
        if not 0 <= factor < math.inf:
            raise ValueError(f"rates has {factor} for {pattern!r}; a factor of the learning rate is 0 or more")
        factors |= dict.fromkeys(found, float(factor))
    return factors


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
