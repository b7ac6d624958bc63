"""What a format of another program is."""

from typing import Any

from ...config import ModelConfig
from .keys import Keys
from .table import Entry

MIXER = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
)
"""the parameters of a Mamba layer, which all programs call as mamba_ssm does"""


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
        """The names of a model's tensors. Of tied embeddings the head is `copies`."""
        raise NotImplementedError

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Names of theirs that may be there besides, and that they must then equal."""
        return {}

    def missing(self, config: ModelConfig) -> list[str]:
        """What of a model this format has no place for, a sentence each; empty if it has one for all."""
        raise NotImplementedError

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model of which nothing is `missing`."""
        raise NotImplementedError
