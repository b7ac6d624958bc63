"""Models made of models: fewer experts, more of them, merged ones, and averages of checkpoints.

Each returns a new model on the same device, in the mode and dtype of the one that it was made of, which stays as it is.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..config import ExpertsConfig, ModelConfig, RoutedMambaConfig
from ..layers import routers
from ..layers.moe.experts import Experts, LinearExperts
from ..layers.quantised import expect_full
from ..letters import LETTERS
from ..model import MoEMamba, foreign_parts

Chosen = Sequence[int] | Tensor


def prune(model: MoEMamba, keep: Sequence[Chosen] | Chosen) -> MoEMamba:
    """Keep some experts of each router, in the order given, with their rows of the router.

    Args:
        keep: for each router, bottom to top, the experts to keep, which may be more in one layer than in another; or
            one such list for all.
    Raises:
        ValueError: an expert that there is not, twice the same, fewer than top_k, or several numbers in one layer.
    """
    chosen = _of_each(model, keep)
    for number, own in enumerate(chosen):
        if len(set(own)) < len(own):
            raise ValueError(f"router {number} is to keep {own}; name each expert once")
    return _made(model, [len(own) for own in chosen], lambda number, stack: stack[list(chosen[number])])


def merge(model: MoEMamba, groups: Sequence[Sequence[int]]) -> MoEMamba:
    """Put the mean of each group of experts, and of their rows of the router, in the place of the group.

    Args:
        groups: of experts, the same for each router: [[0, 1], [2, 3]].
    Raises:
        ValueError: a group without experts, or an expert that there is not; fewer groups than top_k.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError(f"groups is {groups!r}; give groups of one or more experts each")
    for group in groups:
        _of_each(model, group)
    counts = [len(groups)] * len(model.config.routers)
    return _made(model, counts, lambda _, stack: torch.stack([stack[list(group)].mean(0) for group in groups]))


def split(model: MoEMamba, times: int, *, divide: bool = False, top_k: int | None = None) -> MoEMamba:
    """Put several experts in the place of each, to be trained apart from there on.

    With `top_k` times as large, which is the default, the new model computes what the old one does: the copies of an
    expert are chosen together, and share its gate.

    Args:
        times: experts for each.
        divide: give each a part of the hidden width, so that the number of weights stays (fine-grained experts, arXiv
            2401.06066), and not a copy of all.
        top_k: choices for each token of the new model; fewer than the default change what it computes.
    Raises:
        ValueError: `times` is less than 2, or does not divide the hidden width.
    """
    if times < 2:
        raise ValueError(f"times is {times}; it must be 2 or more")
    config = model.config
    scores = {experts.scores for experts in config.routers}
    # A softmax gives each copy its share of the gate, sigmoids give each copy all of it.
    scale = (1.0 if "softmax" in scores else 1 / times) * (times if divide else 1)

    def parts(_: int, stack: Tensor, name: str) -> Tensor:
        if divide and name in ("up_proj", "up_bias"):
            stack = _hidden_parts(stack, times, 1, 2 if _gated(model) else 1)
        elif divide and name == "down_proj":
            stack = _hidden_parts(stack, times, 2, 1)
        else:
            stack = stack.repeat_interleave(times, 0)
        if name == "down_bias":
            return stack * (scale / times if divide else scale)
        if name == "ungated":  # of R's experts each copy counts in full
            return stack / times
        return stack * scale if name in ("down_proj", "gated") else stack

    if divide and "R" in config.pattern and config.routed.routing == "shared":
        raise ValueError(
            "with shared routing the experts of R are single matrices, which have no hidden width to divide"
        )
    before = config.routers[0] if config.routers else None
    if before is None:
        raise ValueError("the model has no experts")
    changes: dict[str, Any] = {"top_k": before.top_k * times if top_k is None else top_k}
    if divide:
        wide = config.d_expert if "E" in config.pattern else config.d_routed_expert
        if wide % times:
            raise ValueError(f"times is {times}, which does not divide the hidden width of the experts, {wide}")
        changes["d_expert"] = wide // times
        if before.n_shared_experts:
            changes["n_shared_experts"] = before.n_shared_experts * times
    return _made(model, [own.count * times for own in config.routers], parts, named=True, **changes)


def average(models: Sequence[MoEMamba], weights: Sequence[float] | None = None) -> MoEMamba:
    """The weighed mean of models of one architecture: checkpoints of a run, or fine-tuned from the same one.

    Args:
        weights: of the models; the same for all if None. They are divided by their sum.
    Raises:
        ValueError: models of several architectures, weights that do not fit, or no model.
    """
    if not models:
        raise ValueError("models is empty; give one or more")
    if len({repr(dataclasses.replace(model.config, init="default")) for model in models}) > 1:
        raise ValueError("the models are of several architectures; only weights that belong together have a mean")
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or sum(shares) == 0:
        raise ValueError(f"weights is {shares}; give one for each of the {len(models)} models, whose sum is not 0")
    for model in models:
        expect_full(model)
    states = [model.state_dict() for model in models]
    if len({frozenset(state) for state in states}) > 1:
        raise ValueError("the models have different parts; only weights that belong together have a mean")
    made = deepcopy(models[0])  # with parts of somebody's own, too
    with torch.no_grad():
        for name, target in made.state_dict().items():
            parts = [state[name].to(target.device) for state in states]
            total = sum(share * part.double() for share, part in zip(shares, parts, strict=True))
            target.copy_(total / sum(shares))
    return made


def _of_each(model: MoEMamba, given: Sequence[Chosen] | Chosen) -> list[list[int]]:
    """Lists of experts for each router, checked."""
    own = model.config.routers
    if not own:
        raise ValueError("the model has no experts")
    single = isinstance(given, Tensor) or all(isinstance(each, int) for each in given)
    lists: list[Any] = [given] * len(own) if single else list(given)
    chosen = [[int(expert) for expert in each] for each in lists]
    if len(chosen) != len(own):
        raise ValueError(f"there are lists for {len(chosen)} routers, and the model has {len(own)}")
    for number, (each, experts) in enumerate(zip(chosen, own, strict=True)):
        if not each or not all(0 <= expert < experts.count for expert in each):
            raise ValueError(f"router {number} is to have {each}; its experts are 0 to {experts.count - 1}")
    return chosen


def _with_counts(config: ModelConfig, counts: Sequence[int]) -> ModelConfig:
    """A configuration with so many experts of each router, bottom to top; one number where all are the same.

    Raises:
        ValueError: routers of one layer have several numbers.
    """
    left, found = list(counts), defaultdict[str, list[int]](list)
    for letters, configs in config.sublayers():
        for letter, own in zip(letters, configs, strict=True):
            several = [left.pop(0) for _ in LETTERS[letter].routers(own)]
            if len(set(several)) > 1:
                raise ValueError(
                    f"the routers of one layer {letter} would have {several} experts; give as many to each"
                )
            for part in LETTERS[letter].parts if several else ():
                if isinstance(getattr(config, part), ExpertsConfig | RoutedMambaConfig):
                    found[part].append(several[0])
    changes: dict[str, Any] = {}
    for part, numbers in found.items():
        options = getattr(config, part)
        changes[part] = options.changed({"n_experts": numbers[0] if len(set(numbers)) == 1 else tuple(numbers)}, set())
    return dataclasses.replace(config, **changes)


def _empty(model: MoEMamba, config: Any) -> MoEMamba:
    """A model to be filled, like another."""
    expect_full(model)
    like = next(model.parameters())
    with torch.device("meta"):
        made = MoEMamba(config)
    made.to_empty(device=like.device).to(like.dtype)
    if config.tie_embeddings:
        made.head.weight = made.embedding.weight
    made.recompute = model.recompute
    return made.train(model.training)


def _made(
    model: MoEMamba, counts: Sequence[int], change: Callable[..., Tensor], named: bool = False, **changes: Any
) -> MoEMamba:
    """The model with other experts, so many for each router: `change` makes the new stack of an old one, whose first
    dimension is experts."""
    if parts := foreign_parts(model):
        name, kind = next(iter(parts.items()))
        raise ValueError(f"{name} is {kind}, of which nobody but you knows what is an expert's; change it by yourself")
    config = _with_counts(model.config, counts)
    made = _empty(model, config.replace(**changes) if changes else config)
    stacks = _stacks(model)
    old = model.state_dict()
    with torch.no_grad():
        for name, target in made.state_dict().items():
            value = old[name]
            if name in stacks:
                number, what = stacks[name]
                value = change(number, value, what) if named else change(number, value)
            target.copy_(value)
    return made


def _stacks(model: MoEMamba) -> dict[str, tuple[int, str]]:
    """The tensors that have an entry for each expert, by name: which router's, and what they are."""
    found = {}
    for number, place in enumerate(routers(model)):
        layer = model.get_submodule(place)
        for name, module in layer.named_modules():
            inside = any(part and f"{name}.".startswith(f"{part}.") for part in _nested(layer))
            if inside or not (name == "router" or isinstance(module, Experts | LinearExperts)):
                continue
            for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                gate = "gated" if name == "out_proj" else "ungated"
                what = gate if isinstance(module, LinearExperts) else own
                found[f"{place}.{name}.{own}"] = number, what
    return found


def _nested(layer: torch.nn.Module) -> list[str]:
    """Layers inside of one that have routers of their own."""
    return [place for place in routers(layer) if place]


def _gated(model: MoEMamba) -> bool:
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    return experts.up_proj.shape[1] == 2 * experts.down_proj.shape[2]


def _hidden_parts(stack: Tensor, times: int, dimension: int, halves: int) -> Tensor:
    """(e, ...) cut along the hidden width, of which there may be two halves: (e * times, ...)."""
    wide = stack.shape[dimension] // halves
    cut = stack.unflatten(dimension, (halves, times, wide // times))  # ..., halves, times, part, ...
    return cut.movedim(dimension + 1, 1).flatten(dimension + 1, dimension + 2).flatten(0, 1)
