"""Dense models made into mixtures of experts that compute the same at first (sparse upcycling, arXiv 2212.05055).

A model with feed-forward layers: each becomes experts, which are copies of it, or of slices of it in virtual groups
(arXiv 2410.07524), beside a router of zeros. Every token then weighs each expert with 1 / n_experts, which the experts'
second matrices undo. A model without: a layer of experts whose second matrices are zero comes after each Mamba layer.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load, model_tensors, write_model
from ..config import ExpertsConfig, ModelConfig, parse_pattern
from ..host.files import new_directory, vacant
from ..layers.quantised import expect_full
from ..model import MoEMamba


@dataclass(frozen=True)
class Upcycled:
    """What became of a model."""

    before: ModelConfig
    config: ModelConfig
    difference: float
    """largest difference of a logit, on random tokens"""
    spread: float
    """standard deviation of the logits, to compare it with"""


def upcycle(
    run: str | Path,
    out: str | Path,
    n_experts: int | tuple[int, ...] = 8,
    top_k: int | None = None,
    granularity: int = 1,
    d_expert: int | None = None,
    router_std: float = 0.0,
    seed: int = 0,
) -> Upcycled:
    """Write a mixture of experts that computes what a dense model does, for `train --start`.

    Args:
        n_experts: of each layer; several numbers are those of each layer that gets experts, bottom to top.
        top_k: experts that each token visits; as many as make up one copy if None.
        granularity: slices that a feed-forward layer is cut into, an expert each: its copies are n_experts /
            granularity.
        d_expert: width of experts that come after Mamba layers, where there was nothing to copy.
        router_std: of the rows of the routers of copies, one for each copy. With 0 the function is exactly the same,
            and all tokens choose the same copy until a balance loss or bias moves them; 0.001 spreads them at once.
        seed: of what is drawn.
    Raises:
        ValueError: the model has experts already, or weights of 8 bits, or the numbers do not fit.
        FileExistsError: there is something at `out`.
        OSError: it cannot be read or written.
    """
    place = vacant(out)
    dense, tokenizer = load(run)
    expect_full(dense)
    config = upcycled_config(dense.config, n_experts, top_k, granularity, d_expert)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = MoEMamba(config).eval()
        tensors = upcycled(dense.config, config, model_tensors(dense), granularity, router_std)
    with torch.no_grad():
        for name, tensor in model_tensors(sparse).items():
            if name in tensors:
                tensor.copy_(tensors[name])
    difference, spread = compare(dense, sparse, seed)
    with new_directory(place) as folder:
        write_model(folder, config, model_tensors(sparse), tokenizer)
    return Upcycled(dense.config, config, difference, spread)


def upcycled_config(
    config: ModelConfig, n_experts: int | tuple[int, ...], top_k: int | None, granularity: int, d_expert: int | None
) -> ModelConfig:
    """The configuration of the mixture.

    Raises:
        ValueError: there is none.
    """
    if set("ER") & set(config.pattern):
        raise ValueError(f"the pattern {config.pattern} has experts already; train it on with --start")
    if "F" not in config.pattern:
        return _inserted(config, n_experts, top_k, granularity, d_expert)
    if d_expert is not None:
        raise ValueError("d_expert is of experts after Mamba layers; those of a feed-forward layer have its width")
    k, wide = top_k or granularity, config.d_ff
    counts = n_experts if isinstance(n_experts, tuple) else (n_experts,)
    for value, what in (*((count, "n_experts") for count in counts), (k, "top_k"), (wide, "d_ff")):
        if value % granularity:
            raise ValueError(f"granularity is {granularity}, which does not divide {what} = {value}")
    dense = config.feedforward
    experts = ExpertsConfig(n_experts, k, wide // granularity, dense.activation, bias=dense.bias)
    return _replaced(config, config.pattern.replace("F", "E"), experts)


def _inserted(
    config: ModelConfig, n_experts: int | tuple[int, ...], top_k: int | None, granularity: int, d_expert: int | None
) -> ModelConfig:
    """With experts after each Mamba layer."""
    if granularity != 1:
        raise ValueError(f"granularity is {granularity}, but the pattern {config.pattern} has no F to cut into slices")
    if "M" not in config.pattern or "(" in config.pattern:
        raise ValueError(f"the pattern {config.pattern} has neither F nor an M of its own, so that no experts fit in")
    return _replaced(config, config.pattern.replace("M", "ME"), ExpertsConfig(n_experts, top_k or 1, d_expert))


def _replaced(config: ModelConfig, pattern: str, experts: ExpertsConfig) -> ModelConfig:
    return dataclasses.replace(config, pattern=pattern, experts=experts)


def upcycled(
    before: ModelConfig, after: ModelConfig, tensors: dict[str, Tensor], granularity: int, router_std: float
) -> dict[str, Tensor]:
    """The tensors of the mixture that are not drawn anew, by name."""
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.")}
    places = list(_places(before, after))
    built = [configs for _, configs in after.sublayers()]
    for old, new in places:
        if old is None:
            found |= _idle(built[new][0], f"layers.{new}.branches.0.experts.")
            continue
        for name, tensor in tensors.items():
            if name.startswith(f"layers.{old}."):
                found[name.replace(f"layers.{old}.", f"layers.{new}.", 1)] = tensor
    if "F" in before.pattern:
        for number, letters in enumerate(before.layers):
            for branch in [branch for branch, letter in enumerate(letters) if letter == "F"]:
                place = f"layers.{number}.branches.{branch}."
                own = {name: found.pop(f"{place}{name}") for name in _dense(before)}
                copied = _copies(own, built[number][branch].experts, granularity, router_std)
                found |= {f"{place}{name}": tensor for name, tensor in copied.items()}
    return found


def _places(before: ModelConfig, after: ModelConfig) -> Iterator[tuple[int | None, int]]:
    """For each sub-layer of the mixture which one of the dense model it is; None for one that is new."""
    if len(parse_pattern(before.pattern)) == len(parse_pattern(after.pattern)):
        yield from ((number, number) for number in range(len(after.layers)))
        return
    old = 0
    for new, letters in enumerate(after.layers):
        if letters == "E":
            yield None, new
        else:
            yield old, new
            old += 1


def _idle(config: ModelConfig, place: str) -> dict[str, Tensor]:
    """Of experts that add nothing yet."""
    experts = config.experts
    found = {f"{place}down_proj": torch.zeros(experts.count, config.d_model, config.d_expert)}
    return found | ({f"{place}down_bias": torch.zeros(experts.count, config.d_model)} if experts.bias else {})


def _dense(config: ModelConfig) -> list[str]:
    names = [f"{name}_proj.weight" for name in ("up", "down")]
    return names + ([f"{name}_proj.bias" for name in ("up", "down")] if config.feedforward.bias else [])


def _copies(dense: dict[str, Tensor], experts: ExpertsConfig, slices: int, router_std: float) -> dict[str, Tensor]:
    """Experts and router from the tensors of a feed-forward layer.

    Each of top_k experts counts 1 / n_experts; of a copy's slices all are needed, of copies there are top_k / slices.
    """
    n, copies = experts.count, experts.count // slices
    scale = n * slices / experts.top_k
    up, down = dense["up_proj.weight"], dense["down_proj.weight"]
    gated = up.shape[0] // down.shape[1]  # 2 where the first half of the rows is a gate
    found = {
        "experts.up_proj": _sliced(up, gated, slices).repeat(copies, 1, 1),
        "experts.down_proj": torch.stack(down.chunk(slices, dim=1)).repeat(copies, 1, 1) * scale,
    }
    if experts.bias:
        found["experts.up_bias"] = _sliced(dense["up_proj.bias"], gated, slices).repeat(copies, 1)
        found["experts.down_bias"] = dense["down_proj.bias"].repeat(n, 1) * (n / experts.top_k)
    rows = torch.randn(copies, up.shape[1]) * router_std
    return found | {"router.weight": rows.repeat_interleave(slices, dim=0)}


def _sliced(rows: Tensor, gated: int, slices: int) -> Tensor:
    """(gated * f, ...) -> (slices, gated * f / slices, ...): of the gate and of what it gates the same part."""
    parts = rows.unflatten(0, (gated, slices, -1))
    return parts.transpose(0, 1).flatten(1, 2)


def compare(dense: MoEMamba, sparse: MoEMamba, seed: int = 0) -> tuple[float, float]:
    """The largest difference of a logit on random tokens, and the standard deviation of logits."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, dense.config.vocab_size, (2, 64), generator=draw)
    with torch.no_grad():
        expected, found = dense(tokens).logits, sparse(tokens).logits
    assert expected is not None
    assert found is not None
    return (found - expected).abs().max().item(), expected.std().item()
