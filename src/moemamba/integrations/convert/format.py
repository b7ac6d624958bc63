"""What a format of another program is."""

from typing import Any

from ...config import ModelConfig
from .keys import Keys
from .table import Entry


def mixer(config: ModelConfig) -> list[str]:
    """The parameters of a Mamba layer, which all programs call as mamba_ssm does."""
    names = ["in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"]
    names += ["conv1d.bias"] if config.mamba.conv_bias else []
    return [*names, "out_proj.weight"] + (["in_proj.bias", "out_proj.bias"] if config.mamba.proj_bias else [])


class Format:
    """How another program stores a model.

    Attributes:
        name: as `export --to` has it.
        title: for people.
    """

    name: str
    title: str

    def recognises(self, keys: Keys) -> bool:
        """Whether a config.json is one of this format."""
        return keys.values.get("model_type") == self.name

    def model(self, keys: Keys) -> ModelConfig:
        """Our configuration of the model that a config.json describes.

        Raises:
            ValueError: a key is missing or of another type, or our layers do not compute what it asks for.
        """
        raise NotImplementedError

    def table(self, config: ModelConfig) -> list[Entry]:
        """The names of a model's tensors. Of tied embeddings the head is one of `copies`."""
        raise NotImplementedError

    def zeros(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Tensors of zeros that they have besides, by name, with their shapes, when a model goes out."""
        return {}

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Names of theirs that may be there besides, and that they must then equal."""
        return {}

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, which `portability` says has one."""
        raise NotImplementedError
