"""The models of a comparison as they are named on the command line. No torch here."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...host.files import expanded
from ...marks import marks
from ...presets import preset
from ...reading import from_dict, read_config, shown, to_dict
from ...training.config import TrainConfig

# What may differ between models in training: their recipe, and their steps, which are a schedule of its own on the
# batches that the others begin with; never the data or its order.
RECIPE = {name for name, each in marks(TrainConfig).items() if each.recipe}


@dataclass(frozen=True)
class Contender:
    """One model of a comparison."""

    name: str
    model: ModelConfig
    recipe: dict[str, Any]
    """fields of `TrainConfig` that differ from the others', out of `RECIPE`"""

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """Raises ValueError if a model cannot be called so: its runs lie in a folder of its name."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{shown(name)} cannot name a model's folder; use letters, digits, and any of - _ . +")


def parse_contender(text: str) -> Contender:
    """`mamba-tiny`, `NAME=PRESET`, `NAME=config.json`, each with changes behind: `wide=moe-mamba-tiny,n_experts=32`.

    Changes are fields of the model's configuration (`routed.experts.n_experts=4` where the last name alone is not
    enough; lists as in JSON, `routed.projections=["conv","out"]`) or of its recipe.

    Raises:
        ValueError: no such preset or field, or a value that cannot work.
        OSError: the file cannot be read.
    """
    source, *changes = re.split(r",(?![^\[]*\])", text)  # commas within a list belong to it
    name, named, source = source.rpartition("=")
    model = read_config(ModelConfig, expanded(source)) if source.endswith(".json") else preset(source)
    recipe: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} in {text!r} is not a change; write FIELD=VALUE")
        if key in RECIPE:
            recipe[key] = _value(value)
        elif key in {field.name for field in fields(TrainConfig)}:
            raise ValueError(f"{key} must be the same for all models; give --{key.replace('_', '-')} instead")
        else:
            model = _changed(model, key, _value(value))
    return Contender(name if named else Path(source).stem, model, recipe)


def parse_contenders(texts: Sequence[str]) -> list[Contender]:
    """All models of a comparison, the baseline first; raises ValueError also if two have one name."""
    contenders = [parse_contender(text) for text in texts]
    names = [contender.name for contender in contenders]
    twice = [name for name in names if names.count(name) > 1]
    if len(names) < 2:
        raise ValueError("a comparison needs two models or more, the baseline first: mamba-tiny moe-mamba-tiny")
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}; give one another name: NAME={twice[0]}")
    return contenders


def _changed(model: ModelConfig, key: str, value: Any) -> ModelConfig:
    if "." not in key:
        return model.replace(**{key: value})
    values = to_dict(model)
    *parts, last = key.split(".")
    place = values
    for part in parts:
        place = place.setdefault(part, {})
    place[last] = value
    return from_dict(ModelConfig, values, "model")


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
