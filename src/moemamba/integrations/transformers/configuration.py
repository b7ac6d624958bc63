"""`ModelConfig` as a configuration of transformers."""

from dataclasses import fields
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from ...config import MODEL_TYPE, ModelConfig
from ...letters import LETTERS
from ...reading import from_dict, to_dict

FIELDS = tuple(field.name for field in fields(ModelConfig))
CODE = "modeling_moemamba"  # the module beside the weights, for who loads with trust_remote_code


class MoEMambaConfig(PreTrainedConfig):  # type: ignore[misc,no-untyped-call]
    """The fields of `moemamba.ModelConfig`, those of parts as dictionaries: `MoEMambaConfig(pattern="ME", d_model=64)`.

    Besides them what transformers has for every model: `use_cache`, `eos_token_id` and so on. A field of ours that is
    changed after the configuration was made is read when a model is built from it.

    Raises:
        ValueError: a value that cannot work, named with what would.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "router"]
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "tie_word_embeddings": "tie_embeddings"}

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        renamed = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        own = {name: renamed.pop(name) for name in FIELDS if name in renamed}
        for name, value in vars_of(from_dict(ModelConfig, own)).items():
            setattr(self, name, value)
        for derived in ("num_hidden_layers", "layer_types"):
            renamed.pop(derived, None)
        super().__post_init__(**renamed)
        classes = {"AutoConfig": "MoEMambaConfig", "AutoModel": "MoEMambaModel"}
        classes |= {"AutoModelForCausalLM": "MoEMambaForCausalLM"}
        self.auto_map = {auto: f"{CODE}.{name}" for auto, name in classes.items()}

    @classmethod
    def of(cls, config: ModelConfig, **others: Any) -> Self:
        """A configuration with the fields of ours, and others of transformers'."""
        return cls(**vars_of(config), **others)

    def native(self) -> ModelConfig:
        """Ours, as `MoEMamba` takes it; raises ValueError if a field has become what cannot work."""
        return from_dict(ModelConfig, {name: getattr(self, name) for name in FIELDS})

    @property
    def num_hidden_layers(self) -> int:
        """Residual sub-layers."""
        return len(self.native().layers)

    @property
    def layer_types(self) -> list[str]:
        """In transformers' words: what a sub-layer remembers of a sequence."""
        kinds = (kind(layer) for layer in self.native().layers)
        return list(kinds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of our later fields those that are in use."""
        values: dict[str, Any] = super().to_dict()
        for name in FIELDS:
            values.pop(name, None)
        return values | to_dict(self.native())

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written: all of ours, so that nothing depends on the defaults of a version."""
        values: dict[str, Any] = super().to_diff_dict()
        return {name: value for name, value in values.items() if name not in FIELDS} | to_dict(self.native())


def vars_of(config: ModelConfig) -> dict[str, Any]:
    """Every field, with the parts as plain dictionaries without what is not in use."""
    written = to_dict(config)
    return {name: written.get(name, getattr(config, name)) for name in FIELDS}


def kind(layer: str) -> str:
    """Of letters that run in parallel: transformers' word for the one that remembers most, "moe" for none."""
    config = ModelConfig()
    grows = any(
        LETTERS[letter].state_bytes(config, 2, 4) > LETTERS[letter].state_bytes(config, 1, 4) for letter in layer
    )
    remembers = any(LETTERS[letter].state_bytes(config, 1, 4) for letter in layer)
    return "full_attention" if grows else "linear_attention" if remembers else "moe"
