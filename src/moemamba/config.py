"""What a model is: frozen dataclasses that check themselves, to JSON and back. No torch here."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .reading import validate

Activation = Literal["relu", "gelu", "silu", "swiglu"]
Projection = Literal["conv", "gate", "out"]

LETTERS = {
    "M": "Mamba",
    "E": "experts",
    "F": "feed-forward",
    "A": "attention",
    "R": "routed Mamba",
}


@dataclass(frozen=True)
class MambaConfig:
    """The selective state-space layer, letter `M` (arXiv 2312.00752, section 3.4)."""

    d_state: int = 16
    """state dimensions of each channel, n"""
    d_conv: int = 4
    """taps of the causal convolution, k: how many tokens it sees"""
    expand: float = 2.0
    """width inside the layer as a multiple of d_model: d_inner = int(expand * d_model)"""
    dt_rank: int | None = None
    """rank of the step-size projection, r; ceil(d_model / 16) if None"""

    def __post_init__(self) -> None:
        validate(self, positive=("d_state", "d_conv", "expand", "dt_rank"))


@dataclass(frozen=True)
class ExpertsConfig:
    """A routed mixture of feed-forward experts, letter `E` (MoE-Mamba, section 3.1)."""

    n_experts: int = 8
    """experts of each layer, of which a token visits top_k"""
    top_k: int = 1
    """experts that each token is sent to"""
    d_expert: int | None = None
    """hidden width of an expert; if None, such that one expert has 6 d_model^2 weights, about one Mamba layer"""
    activation: Activation = "swiglu"
    """nonlinearity inside an expert"""
    capacity_factor: float | None = None
    """while training, an expert takes floor(capacity_factor * tokens * top_k / n_experts) choices and drops later ones;
    None never drops"""
    n_shared_experts: int = 0
    """experts that every token visits, besides those that it is sent to"""
    balance_weight: float = 0.01
    """weight of the load-balance loss, which is 1 at perfect balance"""
    z_weight: float = 0.001
    """weight of the router's z-loss (arXiv 2202.08906, eq. 5)"""
    bias_rate: float = 0.0
    """loss-free balancing (arXiv 2408.15664): how far a step moves each expert's selection bias against its load"""

    def __post_init__(self) -> None:
        validate(
            self,
            positive=("n_experts", "top_k", "d_expert", "capacity_factor"),
            not_negative=("n_shared_experts", "balance_weight", "z_weight", "bias_rate"),
        )
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k is {self.top_k}, more than n_experts = {self.n_experts}; choose at most that many")


@dataclass(frozen=True)
class RoutedMambaConfig:
    """Experts inside the Mamba block, letter `R`: which projections are routed, and how."""

    projections: tuple[Projection, ...] = ("conv", "gate", "out")
    """which projections are experts: conv and gate are the two halves of in_proj, out is out_proj (MoE-Mamba, section
    4.4)"""
    routing: Literal["shared", "independent"] = "shared"
    """shared: one decision a block, linear experts (Routing Mamba, arXiv 2506.18145); independent: a router and
    two-layer experts in each projection (MoE-Mamba, section 4.4)"""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """the experts; d_expert, activation and n_shared_experts concern independent routing alone"""

    def __post_init__(self) -> None:
        validate(self)
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(f"projections is {self.projections!r}; name one or more of conv, gate, out, each once")
        if self.routing == "shared" and self.experts.n_shared_experts:
            raise ValueError(
                f"n_shared_experts is {self.experts.n_shared_experts}, but shared routing has linear experts only; "
                'set it to 0 or choose routing = "independent"'
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention with rotary positions, letter `A`."""

    n_heads: int | None = None
    """attention heads; d_model / 64 (at least 1) if None"""
    rope_base: float = 10_000.0
    """base of the rotary positions: larger for longer contexts"""

    def __post_init__(self) -> None:
        validate(self, positive=("n_heads", "rope_base"))


@dataclass(frozen=True)
class FeedForwardConfig:
    """A dense feed-forward layer, letter `F`."""

    d_ff: int | None = None
    """hidden width; if None, such that the layer has 8 d_model^2 weights"""
    activation: Activation = "swiglu"
    """nonlinearity between the two matrices"""
    bias: bool = False
    """biases in its matrices"""

    def __post_init__(self) -> None:
        validate(self, positive=("d_ff",))


@dataclass(frozen=True)
class ModelConfig:
    """A language model: `pattern` repeated `n_blocks` times between an embedding and a head.

    Each letter of the pattern is one residual sub-layer, `x = x + f(norm(x))`: M Mamba, E experts, F feed-forward,
    A attention, R routed Mamba. Letters in parentheses run in parallel: `(ME)` is `x + M(norm x) + E(norm x)` with one
    shared norm.

    Raises:
        ValueError: a value that cannot work, named with what would.
    """

    pattern: str = "ME"
    """layers of a block, a letter each: M Mamba, E experts, F feed-forward, A attention, R routed Mamba; letters in
    parentheses run in parallel"""
    n_blocks: int = 4
    """how often the pattern is repeated"""
    d_model: int = 256
    """width of the model: channels between layers"""
    vocab_size: int = 257
    """tokens that the model knows; 257 is every byte and an end-of-document mark"""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    routed: RoutedMambaConfig = field(default_factory=RoutedMambaConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """normalisation before each layer"""
    final_norm: bool = True
    """a norm before the head"""
    tie_embeddings: bool = False
    """one matrix for embedding and head"""
    init: Literal["default", "paper"] = "default"
    """initial weights: default draws from a normal distribution and scales residual outputs down with depth; paper is
    MoE-Mamba's truncated normal"""

    def __post_init__(self) -> None:
        validate(self, positive=("n_blocks", "d_model", "vocab_size"))
        parse_pattern(self.pattern)
        if self.d_inner < 1:
            raise ValueError(
                f"expand is {self.mamba.expand}, of which d_model = {self.d_model} leaves no channel; "
                f"choose {1 / self.d_model:g} or more"
            )
        if "A" in self.pattern and (self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2):
            raise ValueError(
                f"n_heads is {self.n_heads}, but d_model = {self.d_model} must split into heads of even width; "
                f"choose a divisor of {self.d_model // 2}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """The residual sub-layers from bottom to top, each a string of letters that run in parallel."""
        return parse_pattern(self.pattern) * self.n_blocks

    @property
    def routers(self) -> tuple[ExpertsConfig, ...]:
        """The experts that each router of the model serves, bottom to top: what weighs that router's losses."""
        inner = 1 if self.routed.routing == "shared" else len(self.routed.projections)
        per_letter = {"E": (self.experts,), "R": (self.routed.experts,) * inner}
        return tuple(e for layer in self.layers for letter in layer for e in per_letter.get(letter, ()))

    @property
    def d_inner(self) -> int:
        return int(self.mamba.expand * self.d_model)

    @property
    def dt_rank(self) -> int:
        return self.mamba.dt_rank or math.ceil(self.d_model / 16)

    @property
    def d_expert(self) -> int:
        return self.experts.d_expert or (2 if self.experts.activation == "swiglu" else 3) * self.d_model

    @property
    def d_routed_expert(self) -> int:
        """Hidden width of the two-layer experts of an R block: as many weights as the projection that they replace."""
        gated = 1.5 if self.routed.experts.activation == "swiglu" else 1.0
        same_size = self.d_model * self.d_inner / (self.d_model + self.d_inner) / gated
        return self.routed.experts.d_expert or max(1, round(same_size))

    @property
    def d_ff(self) -> int:
        return self.feedforward.d_ff or (
            8 * self.d_model // 3 if self.feedforward.activation == "swiglu" else 4 * self.d_model
        )

    @property
    def n_heads(self) -> int:
        return self.attention.n_heads or max(1, self.d_model // 64)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        A field of a part is named directly, as in `replace(n_experts=32)`: it changes in every part that the letters of
        the pattern use and that has such a field, for `R` also in the experts inside the block.

        Raises:
            ValueError: there is no such field, no letter of the pattern uses it, or the values cannot work.
        """
        own = {f.name for f in dataclasses.fields(self)}
        result = dataclasses.replace(self, **{name: value for name, value in changes.items() if name in own})
        inner = {name: value for name, value in changes.items() if name not in own}
        used: set[str] = set()
        parts = {
            part: _changed(getattr(result, part), inner, used)
            for part, letters in PARTS.items()
            if set(letters) & set(result.pattern)
        }
        if "R" in result.pattern:
            parts["routed"] = _changed_routed(result.routed, inner, used)
        for name in inner.keys() - used:
            raise ValueError(f"{name} {self._why_unused(name, result.pattern)}")
        return dataclasses.replace(result, **parts)

    def check_used(self, default: "ModelConfig") -> None:
        """Whether the letters of the pattern use all that differs from a default.

        Raises:
            ValueError: a field of a part that would change nothing.
        """
        for part, letters in {**PARTS, "routed": "R"}.items():
            if not set(letters) & set(self.pattern):
                self._check_same(part, getattr(self, part), getattr(default, part))
        if "R" in self.pattern and self.routed.routing == "shared":
            self._check_same("routed.experts", self.routed.experts, default.routed.experts, TWO_LAYER)

    def _check_same(self, where: str, part: Any, default: Any, names: Iterable[str] = ()) -> None:
        for name in names or sorted(_names(part)):
            if getattr(part, name) != getattr(default, name):
                raise ValueError(f"{where}.{name} {self._why_unused(name, self.pattern)}")

    def _why_unused(self, name: str, pattern: str) -> str:
        parts = (*(getattr(self, part) for part in PARTS), self.routed, self.routed.experts)
        if not any(name in _names(part) for part in parts):
            return "is no field of the configuration; see ModelConfig"
        independent = name in TWO_LAYER and "R" in pattern
        hint = '; with routing = "independent" R would' if independent else "; choose a pattern that does"
        return f"would change nothing: no letter of the pattern {pattern!r} uses it{hint}"


PARTS = {"mamba": "MR", "experts": "E", "attention": "A", "feedforward": "F"}  # and the letters that use them
TWO_LAYER = ("d_expert", "activation", "n_shared_experts")  # of experts that are no single matrix


def _names(part: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(part)}


def _changed(part: Any, changes: dict[str, Any], used: set[str]) -> Any:
    """A part with those of the changes that are its fields, which are then noted as used."""
    own = {name: value for name, value in changes.items() if name in _names(part)}
    used.update(own)
    return dataclasses.replace(part, **own) if own else part


def _changed_routed(part: RoutedMambaConfig, changes: dict[str, Any], used: set[str]) -> RoutedMambaConfig:
    """The same for `R`, whose experts have fewer fields where they are linear."""
    own = {name: value for name, value in changes.items() if name in _names(part)}
    linear = own.get("routing", part.routing) == "shared"
    inside = {name: value for name, value in changes.items() if not (linear and name in TWO_LAYER)}
    used.update(own)
    return dataclasses.replace(part, **own, experts=_changed(part.experts, inside, used))


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """`"M(ME)E"` -> `("M", "ME", "E")`: one entry for each residual sub-layer, its letters run in parallel."""
    layers: list[str] = []
    group: str | None = None
    for position, letter in enumerate(pattern):
        if letter == "(" and group is None:
            group = ""
        elif letter == ")" and group:
            layers.append(group)
            group = None
        elif letter in LETTERS and group is not None:
            group += letter
        elif letter in LETTERS:
            layers.append(letter)
        else:
            raise ValueError(
                f"pattern {pattern!r} has {letter!r} at position {position}; use the letters "
                f"{', '.join(f'{k} ({v})' for k, v in LETTERS.items())} and groups such as (ME)"
            )
    if group is not None or not layers:
        raise ValueError(f"pattern {pattern!r} {'lacks a closing parenthesis' if layers or group else 'has no layer'}")
    return tuple(layers)
