"""How large a model is and what a token costs, from its configuration alone: nothing is allocated. No torch here."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .config import ModelConfig, expect_config, parse_pattern
from .letters import LETTERS, Letter


class Sublayer(NamedTuple):
    """A residual sub-layer, or several that are alike."""

    letters: str
    branches: tuple[tuple[Letter, ModelConfig], ...]
    """its letters, with the configuration that each is built from"""
    times: int
    """how often the model has it"""
    total: int
    """parameters of one"""
    active: int


def sublayers(config: ModelConfig) -> Iterator[Sublayer]:
    """The residual sub-layers from bottom to top: those of one block where blocks are alike, else all."""
    blocks: Iterable[tuple[str, tuple[ModelConfig, ...]]] = config.sublayers()
    if not config.uneven:
        blocks = [(letters, (config,) * len(letters)) for letters in parse_pattern(config.pattern)]
    for letters, configs in blocks:
        branches = tuple((LETTERS[letter], own) for letter, own in zip(letters, configs, strict=True))
        total, active = (
            sum(counts) for counts in zip(*(letter.parameters(own) for letter, own in branches), strict=True)
        )
        norm = _norm(config, config.norm)
        yield Sublayer(letters, branches, 1 if config.uneven else config.n_blocks, total + norm, active + norm)


class ParameterCount(NamedTuple):
    """Parameters of a model. `total` and `active` are counted as the paper does, without embedding and head."""

    total: int
    active: int
    """those that one token passes through: the router, top_k experts and everything else that is not an expert"""
    embedding: int
    """embedding and head (once if tied)"""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total, active and embedding parameters of a model that need not fit anywhere."""
    expect_config(config)
    final_norm = _norm(config, config.final_norm_kind or config.norm) if config.final_norm else 0
    layers = list(sublayers(config))
    tables = 1 if config.tie_embeddings else 2
    return ParameterCount(
        total=sum(each.times * each.total for each in layers) + final_norm,
        active=sum(each.times * each.active for each in layers) + final_norm,
        embedding=config.vocab_size * (tables * config.d_model + config.head_bias),
    )


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of one token's forward pass, a multiply-add being two; training costs three times that.

    Counts the products with active weights and the head, and what a layer computes besides (`Letter.flops`).
    """
    matrices = count_parameters(config).active + config.vocab_size * config.d_model
    return 2 * matrices + sum(
        each.times * letter.flops(own, context) for each in sublayers(config) for letter, own in each.branches
    )


def state_bytes(config: ModelConfig, context: int, element: int = 4) -> int:
    """Size of one sequence's `State` after `context` tokens; scan states are float32, the rest `element` bytes each."""
    return sum(
        each.times * letter.state_bytes(own, context, element)
        for each in sublayers(config)
        for letter, own in each.branches
    )


class Memory(NamedTuple):
    """Bytes that a model takes in float32, without activations."""

    weights: int
    gradients: int
    """while training"""
    optimizer: int
    """AdamW's two moments, while training"""


def memory(config: ModelConfig, moments: int = 2) -> Memory:
    """What a model takes at least, whatever the batch: the one count that `moemamba info` shows and refusals go by.

    Args:
        moments: that the optimiser keeps of a weight: two with AdamW, one at least with Muon.
    """
    count = count_parameters(config)
    weights = 4 * (count.total + count.embedding)
    return Memory(weights, weights, moments * weights)


def require_memory(
    config: ModelConfig, has: int | None, moments: int | None = None, share: float = 1.0, vocabulary: bool = True
) -> None:
    """Refuse a model that cannot fit, before any work.

    Args:
        has: bytes of the machine or the GPU; None if unknown.
        moments: see `memory`; None for a model that is not trained.
        share: how many times the model lies there: less than once where processes on other machines hold the rest.
        vocabulary: embedding and head count too; not while a tokenizer may still settle their size.
    Raises:
        ValueError: with the figure that `moemamba info` shows.
    """
    needs = memory(config, moments or 0)
    total = needs.weights if moments is None else sum(needs)
    settled = total if vocabulary else total - total // needs.weights * 4 * count_parameters(config).embedding
    if has is None or settled <= has / share:
        return
    parts = f"weights {size(needs.weights)}"
    if moments is not None:
        parts += f", gradients {size(needs.gradients)}, optimiser {size(needs.optimizer)}"
    there = "" if share == 1 else f" {share:.3g} times"
    raise ValueError(
        f"the model needs {size(total)} of memory ({parts}){there}, but there are {size(has)}; "
        "choose a smaller model, or a machine with more memory"
    )


def size(number: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    number = min(number, 1e300)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB" if number < 1e6 else f"{number:.1e} TiB"


def _norm(config: ModelConfig, kind: str) -> int:
    return config.d_model * (2 if kind == "layernorm" else 1)
