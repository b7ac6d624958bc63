"""AdamW with its decay groups, the learning rate of a step, and the optimiser's state by parameter name."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .config import TrainConfig

NEVER_DECAYS = {"A_log", "D", "bias"}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups: what decays and what does not.

    With `decay="matrices"` weights of two or more dimensions decay (projections, convolutions, experts, routers,
    embedding and head), but not `A_log`, `D`, biases and norms, as the authors of Mamba mark them. With "all", the
    recipe of MoE-Mamba, everything decays.
    """
    named = list(model.named_parameters())
    decays = [p for name, p in named if config.decay == "all" or _decays(name, p)]
    spared = [p for name, p in named if not (config.decay == "all" or _decays(name, p))]
    groups = [
        {"params": same_mesh, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decays, config.weight_decay), (spared, 0.0))
        for same_mesh in _by_mesh(parameters)
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=named[0][1].device.type in ("cpu", "cuda"),
    )


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded parameters of one mesh together, since one fused update cannot span two."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in NEVER_DECAYS


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that ends step `step` (0 is the first): linear warm-up, then a cosine to the final rate."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.learning_rate * share


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
