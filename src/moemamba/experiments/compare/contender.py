"""The models of a comparison as they are named on the command line. No torch here."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...counting import count_parameters
from ...host.files import expanded
from ...marks import marks
from ...presets import preset
from ...reading import amount, from_dict, read_config, to_dict
from ...training.config import TrainConfig
from ..results import check_name

# What may differ between models in training: their recipe, and their steps, which are a schedule of its own on the
# batches that the others begin with; never the data or its order.
RECIPE = {name for name, each in marks(TrainConfig).items() if each.recipe}

BRANCH = {"steps", "cooldown", "final_lr"}  # what a branch may have of its own
CLOSE = 0.01  # how near `active` must be met


@dataclass(frozen=True)
class Contender:
    """One model of a comparison."""

    name: str
    model: ModelConfig
    recipe: dict[str, Any]
    """fields of `TrainConfig` that differ from the others', out of `RECIPE`"""
    trunk: str | None = None
    """the contender whose runs it branches off, to be cooled down earlier; None for runs of its own"""

    def __post_init__(self) -> None:
        check_name(self.name)


def parse_contender(text: str, own: Collection[str] = frozenset(RECIPE)) -> Contender:
    """`mamba-tiny`, `NAME=PRESET`, `NAME=config.json`, each with changes behind: `wide=moe-mamba-tiny,n_experts=32`.

    Changes are fields of the model's configuration (`routed.experts.n_experts=4` where the last name alone is not
    enough; lists and tables as in JSON, `routed.projections=["conv","out"]`, `rates={"*.router":0.5}`) or of its
    recipe. `active=0.93M` chooses `d_expert`, or without experts `d_ff`, for so many active parameters, counted without
    embedding and head, once all else is known.

    Args:
        own: fields of `TrainConfig` that it may have of its own.
    Raises:
        ValueError: no such preset or field, or a value that cannot work.
        OSError: the file cannot be read.
    """
    source, *changes = re.split(r",(?![^\[{]*[\]}])", text)  # commas within a list or a table belong to it
    name, named, source = source.rpartition("=")
    model = read_config(ModelConfig, expanded(source)) if source.endswith(".json") else preset(source)
    recipe: dict[str, Any] = {}
    active: float | None = None
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} in {text!r} is not a change; write FIELD=VALUE")
        if key == "active":
            active = amount(value, "active")
        elif key in own:
            recipe[key] = _value(value)
        elif key in {field.name for field in fields(TrainConfig)}:
            raise ValueError(f"{key} must be the same for all models; give --{key.replace('_', '-')} instead")
        else:
            model = _changed(model, key, _value(value))
    model = model if active is None else sized(model, active)
    return Contender(name if named else Path(source).stem, model, recipe)


def parse_branch(text: str, others: Sequence[Contender]) -> Contender:
    """`NAME=@TRUNK,steps=N`, with `cooldown` and `final_lr` behind if wanted: the runs of another contender, trained
    with the schedule wsd, left so early that their cool-down ends after N steps.

    Raises:
        ValueError: there is no such contender, or a change that a branch cannot have.
    """
    source, *changes = text.split(",")
    name, named, source = source.partition("=")
    trunk = next((other for other in others if f"@{other.name}" == source), None)
    if not named or trunk is None:
        known = ", ".join(other.name for other in others)
        raise ValueError(f"{text!r} is no branch of another model; write NAME=@MODEL,steps=N with one of {known}")
    own = {key: _value(value) for key, _, value in (change.partition("=") for change in changes)}
    if "steps" not in own or not own.keys() <= BRANCH:
        raise ValueError(f"{text!r} needs steps, and may have cooldown and final_lr besides; it has {', '.join(own)}")
    return Contender(name, trunk.model, {**trunk.recipe, **own}, trunk.name)


def parse_contenders(texts: Sequence[str]) -> list[Contender]:
    """All models of a comparison, the baseline first; raises ValueError also if two have one name."""
    branches = [bool(re.match(r"[^,]*=@", text)) for text in texts]
    if branches[:1] == [True]:
        raise ValueError(f"{texts[0]!r} branches off another model; the first one, the baseline, cannot")
    found = {text: parse_contender(text) for text, branch in zip(texts, branches, strict=True) if not branch}
    trunks = list(found.values())
    found |= {text: parse_branch(text, trunks) for text, branch in zip(texts, branches, strict=True) if branch}
    contenders = [found[text] for text in texts]
    names = [contender.name for contender in contenders]
    twice = [name for name in names if names.count(name) > 1]
    if len(names) < 2:
        raise ValueError("a comparison needs two models or more, the baseline first: mamba-tiny moe-mamba-tiny")
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}; give one another name: NAME={twice[0]}")
    return contenders


def sized(model: ModelConfig, active: float) -> ModelConfig:
    """The model with the width of experts, `d_expert`, or without any of feed-forward layers, `d_ff`, that comes
    nearest to a number of active parameters.

    Raises:
        ValueError: it has neither, or comes no nearer than 1%.
    """
    name = "d_expert" if model.routers else "d_ff"
    if not model.routers and not any("feedforward" in letter.parts for letter in model.letters):
        raise ValueError(
            f"active = {active:,.0f} needs experts or feed-forward layers, whose width it chooses; {model.pattern!r} "
            "has none"
        )
    one, two = (count_parameters(model.replace(**{name: width})).active for width in (1, 2))
    nearest = model.replace(**{name: max(1, 1 + round((active - one) / (two - one)))})
    found = count_parameters(nearest).active
    if abs(found - active) > CLOSE * active:
        raise ValueError(f"active = {active:,.0f} cannot be met within {CLOSE:.0%} by {name}; the nearest is {found:,}")
    return nearest


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
