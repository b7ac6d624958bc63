"""What a model is: frozen dataclasses that check themselves, to JSON and back. No torch here."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Self

from .letters import (
    LETTERS,
    Activation,
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    Letter,
    MambaConfig,
    Options,
    Projection,
    RoutedMambaConfig,
)
from .marks import documented, later
from .reading import shown, to_dict, validate

__all__ = [
    "Activation",
    "AttentionConfig",
    "ExpertsConfig",
    "FeedForwardConfig",
    "MambaConfig",
    "ModelConfig",
    "Projection",
    "RoutedMambaConfig",
    "parse_pattern",
]


MODEL_TYPE = "moemamba"
FOREIGN = frozenset(
    {
        *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "is_encoder_decoder", "return_dict"),
        *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type"),
        *("id2label", "label2id", "hidden_size", "num_hidden_layers", "layer_types"),
    }
)
"""what transformers has in a config.json that says nothing of what the model computes"""


def description(config: "ModelConfig", end_of_text: int | None) -> dict[str, Any]:
    """What config.json holds: the model as `reading.from_dict` reads it, and what transformers asks for besides."""
    ids = {} if end_of_text is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    return to_dict(config) | {"model_type": MODEL_TYPE, "architectures": ["MoEMambaForCausalLM"]} | ids


@documented
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
    norm_eps: float = later(1e-5)
    """added to the variance, or the mean square, in every norm"""
    final_norm_kind: Literal["rmsnorm", "layernorm"] | None = later(None)
    """normalisation before the head; as before each layer if None"""
    head_bias: bool = later(False)
    """a bias of the projection to the vocabulary"""

    if not TYPE_CHECKING:

        def __new__(cls, *arguments: Any, **fields: Any) -> Self:
            """Says where a field is that is not here, as Python would not."""
            own = dataclasses.fields(cls)
            for name in fields.keys() - {field.name for field in own}:
                given = f"{name}={fields[name]!r}"
                for part, kind in ((field.name, field.default_factory) for field in own):
                    if isinstance(kind, type) and issubclass(kind, Options) and name in kind().names():
                        raise TypeError(
                            f"{name} is a field of ModelConfig.{part}: ModelConfig({part}={kind.__name__}({given})), "
                            f"or ModelConfig().replace({given})"
                        )
            return super().__new__(cls)

    def __post_init__(self) -> None:
        validate(self, positive=("n_blocks", "d_model", "vocab_size", "norm_eps"))
        parse_pattern(self.pattern)
        if self.final_norm_kind and not self.final_norm:
            raise ValueError(
                f"final_norm_kind is {self.final_norm_kind!r}, but there is no norm before the head; "
                "set final_norm to True, or final_norm_kind to None"
            )
        for letter in self.letters:
            letter.check(self)
        if self.uneven:
            self._check_layers()

    @classmethod
    def without_foreign(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields of a config.json without those that only transformers reads; see `reading.from_dict`.

        Raises:
            ValueError: they are of another kind of model.
        """
        if (kind := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(
                f"{where} describes a model of the type {shown(kind)}, not {MODEL_TYPE}; "
                "`moemamba convert` reads those of some other types"
            )
        return {name: value for name, value in values.items() if name not in FOREIGN}

    @property
    def layers(self) -> tuple[str, ...]:
        """The residual sub-layers from bottom to top, each a string of letters that run in parallel."""
        return parse_pattern(self.pattern) * self.n_blocks

    @property
    def uneven(self) -> bool:
        """Whether something is given for each layer by itself, as `n_experts` may be."""
        return any(getattr(self, part).counts() for part in self.parts)

    def sublayers(self) -> Iterator[tuple[str, tuple[Self, ...]]]:
        """Each residual sub-layer from bottom to top: its letters, and for each of them the configuration that it is
        built from. That is this one, in which what is given for each layer (`n_experts`) is what this layer has."""
        if not self.uneven:
            yield from ((letters, (self,) * len(letters)) for letters in self.layers)
            return
        seen: Counter[str] = Counter()
        for letters in self.layers:
            own = []
            for letter in letters:
                parts = [part for part in LETTERS[letter].parts if getattr(self, part).counts()]
                changes = {part: getattr(self, part).of_layer(seen[part]) for part in parts}
                own.append(dataclasses.replace(self, **changes) if changes else self)
                seen.update(parts)
            yield letters, tuple(own)

    @property
    def routers(self) -> tuple[ExpertsConfig, ...]:
        """The experts that each router of the model serves, bottom to top, with n_experts of that layer."""
        return tuple(
            experts
            for letters, configs in self.sublayers()
            for letter, own in zip(letters, configs, strict=True)
            for experts in LETTERS[letter].routers(own)
        )

    @property
    def losses(self) -> tuple[ExpertsConfig, ...]:
        """`routers` for whoever asks what weighs their losses only, in every step: n_experts may be that of all
        layers."""
        return tuple(e for letters in self.layers for letter in letters for e in LETTERS[letter].routers(self))

    @property
    def letters(self) -> tuple[Letter, ...]:
        """The letters that the pattern uses, each once."""
        return tuple(letter for name, letter in LETTERS.items() if name in self.pattern)

    @property
    def d_inner(self) -> int:
        return self.mamba.inner(self.d_model)

    @property
    def dt_rank(self) -> int:
        return self.mamba.rank(self.d_model)

    @property
    def d_expert(self) -> int:
        return self.experts.width(self.d_model)

    @property
    def d_routed_expert(self) -> int:
        """Hidden width of the two-layer experts of an R block."""
        return self.routed.width(self.d_model, self.d_inner)

    @property
    def d_ff(self) -> int:
        return self.feedforward.width(self.d_model)

    @property
    def n_heads(self) -> int:
        return self.attention.heads(self.d_model)

    @property
    def n_kv_heads(self) -> int:
        return self.attention.kv_heads(self.d_model)

    @property
    def inner_norm_eps(self) -> float:
        return self.mamba.inner_norm_eps or self.norm_eps

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        A field of a part is named directly, as in `replace(n_experts=32)`: it changes in every part that the letters of
        the pattern use and that has such a field, for `R` also in the experts inside the block.

        Raises:
            ValueError: there is no such field, no letter of the pattern uses it, or the values cannot work.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        own = {name: value for name, value in changes.items() if name in fields}
        inner = {name: value for name, value in changes.items() if name not in fields}
        used: set[str] = set()
        parts: dict[str, Any] = {}
        for name in _parts(str(own.get("pattern", self.pattern))):
            part = own.get(name, getattr(self, name))
            if isinstance(part, Options):
                parts[name] = part.changed(inner, used)
        result = dataclasses.replace(self, **own | parts)  # at once: how many numbers fit depends on pattern and blocks
        for name in inner.keys() - used:
            raise ValueError(f"{name} {result._why_unused(name)}")
        return result

    @property
    def parts(self) -> tuple[str, ...]:
        """The fields that hold options of letters of the pattern."""
        used = _parts(self.pattern)
        return tuple(field.name for field in dataclasses.fields(self) if field.name in used)

    def _check_layers(self) -> None:
        """Raises ValueError where there are other numbers of layers and of what is given for each."""
        for part in self.parts:
            letters = [name for name, letter in LETTERS.items() if part in letter.parts and name in self.pattern]
            layers = self.n_blocks * sum(self.pattern.count(name) for name in letters)
            for name, count in getattr(self, part).counts().items():
                if count != layers:
                    raise ValueError(
                        f"{part}.{name} has {count} numbers, and the model {layers} layers {' and '.join(letters)} "
                        f"(pattern {self.pattern!r}, n_blocks {self.n_blocks}); give one number for all, or {layers}"
                    )

    def check_used(self, default: "ModelConfig") -> None:
        """Whether the letters of the pattern use all that differs from a default.

        Raises:
            ValueError: a field of a part that would change nothing.
        """
        for place, part in vars(self).items():
            if not isinstance(part, Options):
                continue
            names = part.unused() if place in self.parts else sorted(field.name for field in dataclasses.fields(part))  # type: ignore[arg-type]
            for name in names:
                given, usual = (attrgetter(f"{place}.{name}")(config) for config in (self, default))
                if given != usual:
                    raise ValueError(f"{place}.{name} {self._why_unused(name.rpartition('.')[2])}")

    def _why_unused(self, name: str) -> str:
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        if not any(isinstance(part, Options) and name in part.names() for part in parts):
            return "is no field of the configuration; see ModelConfig"
        hints = [hint for letter in self.letters if (hint := letter.why_unused(name))]
        hint = hints[0] if hints else "choose a pattern that does"
        return f"would change nothing: no letter of the pattern {self.pattern!r} uses it; {hint}"


def expect_config(config: Any) -> None:
    """Raise a TypeError for what is no configuration, with what would be."""
    if isinstance(config, ModelConfig):
        return
    hint = f"preset({config!r}) is one" if isinstance(config, str) else "a model has it as model.config"
    if isinstance(getattr(config, "model", None), ModelConfig):
        hint = "a TrainConfig has it as config.model"
    raise TypeError(f"config is a {type(config).__name__}; expected a ModelConfig, and {hint}")


def _parts(pattern: str) -> set[str]:
    """The fields that hold options of its letters."""
    return {part for name, letter in LETTERS.items() if name in pattern for part in letter.parts}


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
                f"pattern {shown(pattern)} has {letter!r} at position {position}; use the letters "
                f"{', '.join(f'{k} ({v.name})' for k, v in LETTERS.items())} and groups such as (ME)"
            )
    if group is not None or not layers:
        raise ValueError(
            f"pattern {shown(pattern)} {'lacks a closing parenthesis' if layers or group else 'has no layer'}"
        )
    return tuple(layers)
