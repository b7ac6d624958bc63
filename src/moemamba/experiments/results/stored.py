"""`results.json` as it lies on the disk: what each field may hold. Nothing in it is used before it is checked here."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ...config import ModelConfig
from ...reading import from_dict, in_words, shown
from .claims import Claim

Status = Literal["finished", "diverged", "unfinished"]  # of a run
SIZE = (1e-18, 1e18)  # of any number in the file but 0: products and quotients of them stay finite
ANY_SIZE = (0.0, 1e300)  # of a setting, which is only shown
TEXT, DEPTH = 100_000, 10  # characters of a text, levels of nesting
LAYERS = 10_000  # of a model: its counts are sums over them
COUNTS = ("steps", "batch_size", "context")  # settings that pages calculate with


@dataclass(frozen=True)
class Evaluation:
    """Columns of held-out figures; a figure that a run does not have is absent or null."""

    step: tuple[int, ...] = ()
    tokens: tuple[int | None, ...] = ()
    seconds: tuple[float | None, ...] = ()
    loss: tuple[float, ...] = ()
    bits_per_byte: tuple[float | None, ...] = ()
    accuracy: tuple[float | None, ...] = ()
    drop_gap: tuple[float | None, ...] = ()
    averaged: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        check_steps(self.step)
        check_lengths(len(self.step), {"loss": self.loss})
        others = {field.name: getattr(self, field.name) for field in fields(self)}
        check_lengths(len(self.step), {name: column for name, column in others.items() if column})


@dataclass(frozen=True)
class Training:
    """Columns of the smoothed training loss."""

    step: tuple[int, ...]
    loss: tuple[float, ...]

    def __post_init__(self) -> None:
        check_steps(self.step)
        check_lengths(len(self.step), {"loss": self.loss})


@dataclass(frozen=True)
class Layer:
    """Columns about one router: load is each expert's at each step."""

    name: str
    load: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]
    dropped: tuple[float, ...]
    balance: tuple[float, ...]
    dead: tuple[int, ...]

    def __post_init__(self) -> None:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        check_lengths(len(self.load), columns)
        if len(widths := {len(shares) for shares in self.load}) > 1 or 0 in widths:
            raise ValueError(f"load has lines of {min(widths)} to {max(widths)} experts; expected as many in each")


@dataclass(frozen=True)
class Router:
    """All routers of a run over training."""

    step: tuple[int, ...] = ()
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        check_steps(self.step)
        check_lengths(len(self.step), {f"layers[{k}].load": layer.load for k, layer in enumerate(self.layers)})
        if bool(self.step) != bool(self.layers):
            raise ValueError(f"it has {len(self.step)} steps of {len(self.layers)} layers; expected some of both")


@dataclass(frozen=True)
class StoredTest:
    """What a finished run came to on the text that nothing was chosen by."""

    tokens: int
    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    drop_gap: float | None = None
    averaged: float | None = None
    blocks: tuple[tuple[float, ...], ...] = ()
    """weight and loss of each"""

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise ValueError(f"tokens is {self.tokens}; it must be greater than 0")
        for block in self.blocks:
            if len(block) != 2 or not 0 < block[0] <= 1:
                raise ValueError(f"blocks has {shown(block)}; expected a weight between 0 and 1, and a loss")


@dataclass(frozen=True)
class StoredRun:
    """One training run."""

    model: str
    seed: int
    state: Status
    tokens_per_second: float | None
    peak_memory: float | None
    evaluation: Evaluation
    training: Training
    router: Router
    train_tokens: int | None = None
    """of its corpus; older files do not say"""
    test: StoredTest | None = None

    def __post_init__(self) -> None:
        if self.train_tokens is not None and not self.train_tokens > 0:
            raise ValueError(f"train_tokens is {self.train_tokens}; it must be greater than 0, or absent")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            raise ValueError(f"tokens_per_second is {self.tokens_per_second}; it must be greater than 0, or null")
        if self.state == "finished" and not self.evaluation.step:
            raise ValueError("state is 'finished', but there is no evaluation")


@dataclass(frozen=True)
class StoredTuning:
    """What trying learning rates found; null where a run diverged."""

    losses: dict[str, float | None]

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("losses is empty; expected learning rates and their losses")
        for rate in self.losses:
            if not re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", rate) or not 0 < float(rate) < ANY_SIZE[1]:
                raise ValueError(f"losses names {shown(rate)}; expected a learning rate")


@dataclass(frozen=True)
class StoredPaper:
    """The paper's side."""

    title: str
    printed: dict[str, float]
    faster: dict[str, float]
    tuning_steps: int
    claims: tuple[Claim, ...]
    tunings: dict[str, StoredTuning]


@dataclass(frozen=True)
class StoredModel:
    """A model; its figures are counted again."""

    name: str
    config: ModelConfig

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.config.pattern) * self.config.n_blocks > LAYERS:
            raise ValueError(f"n_blocks is {self.config.n_blocks}; no comparison has models of over {LAYERS:,} layers")


@dataclass(frozen=True)
class Stored:
    """The file but for what is derived from the rest."""

    command: str | None
    settings: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    environment: dict[str, str]
    paper: StoredPaper | None
    baseline: str
    models: tuple[StoredModel, ...]
    runs: tuple[StoredRun, ...]

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names) or self.baseline not in names[:1]:
            raise ValueError(f"baseline is {shown(self.baseline)}; expected the first of models, each named once")
        check_known("recipes", self.recipes, names)
        check_known("runs", (run.model for run in self.runs), names)
        check_twice("runs", [(run.model, run.seed) for run in self.runs])
        if self.paper:
            check_known("paper.claims", (side for c in self.paper.claims for side in (c.better, c.worse)), names)
        check_settings("settings", self.settings, (*COUNTS, "learning_rate", "data", "tokenizer"))
        for name, recipe in self.recipes.items():
            check_settings(f"recipes.{name}", recipe, ())


def stored(values: dict[str, Any]) -> Stored:
    """The checked content of a `results.json`.

    Raises:
        ValueError: what is wrong, and in which field.
    """
    for key, value in values.items():
        check_plain(key, "a name in results")
        check_plain(value, f"results.{key}", size=ANY_SIZE if key in ("settings", "recipes") else SIZE)
    values = {key: value for key, value in values.items() if key != "format"}
    if isinstance(values.get("models"), list):
        values["models"] = [without(model, StoredModel) for model in values["models"]]
    if isinstance(values.get("paper"), dict) and isinstance(tunings := values["paper"].get("tunings"), dict):
        tunings = {name: without(tuning, StoredTuning) for name, tuning in tunings.items()}
        values["paper"] = values["paper"] | {"tunings": tunings}
    return from_dict(Stored, values, "results")


def without(values: Any, kind: type) -> Any:
    """What a dataclass reads of an object; the rest is derived from it."""
    names = {field.name for field in fields(kind)}
    return {name: values[name] for name in values if name in names} if isinstance(values, dict) else values


def is_figure(value: Any, size: tuple[float, float] = SIZE) -> bool:
    """Whether this is a number that `results.json` may hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value == 0 or size[0] <= abs(value) <= size[1])


def check_plain(value: Any, where: str, depth: int = DEPTH, size: tuple[float, float] = SIZE) -> None:
    """Numbers are finite and of a size to calculate with, texts and nesting bounded, wherever they stand."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, str):
        if len(value) > TEXT:
            raise ValueError(f"{where} has {len(value):,} characters; expected {TEXT:,} at most")
    elif isinstance(value, int | float):
        if not is_figure(value, size):
            raise ValueError(f"{where} is {shown(value)}; expected 0, or a size from {size[0]:g} to {size[1]:g}")
    elif not depth:
        raise ValueError(f"{shown(where)} is nested too deeply")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"a name in {where}", depth)
            check_plain(item, f"{where}.{key if key.isprintable() else shown(key)}", depth - 1, size)
    else:
        for k, item in enumerate(value):
            check_plain(item, f"{where}[{k}]", depth - 1, size)


def check_steps(steps: Sequence[int]) -> None:
    """Steps grow from 0 or more."""
    for before, step in zip((-1, *steps), steps, strict=False):
        if not step > before:
            raise ValueError(f"step has {step} after {before}; expected steps that grow")


def check_lengths(length: int, columns: dict[str, Sequence[Any]]) -> None:
    """Columns are as long as each other."""
    for name, column in columns.items():
        if len(column) != length:
            raise ValueError(f"{name} has {len(column)} entries; expected {length}, as many as there are steps")


def check_name(name: str) -> None:
    """Raises ValueError if a model cannot be called so: its runs lie in a folder of its name."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{shown(name)} cannot name a model's folder; use letters, digits, and any of - _ . +")


def check_known(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Only models of the comparison are named."""
    for name in names:
        if name not in known:
            raise ValueError(f"{where} names {shown(name)}, which is none of its models")


def check_twice(where: str, keys: Sequence[tuple[str, int]]) -> None:
    """No model has two runs with one seed."""
    for model, seed in keys:
        if keys.count((model, seed)) > 1:
            raise ValueError(f"{where} has {model} with seed {seed} twice")


def check_settings(where: str, settings: dict[str, Any], needed: Sequence[str]) -> None:
    """Settings are plain values, and those that pages calculate with are numbers greater than 0."""
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(f"{where} lacks {missing[0]}")
    for name, value in settings.items():
        kinds: tuple[type, ...] = (str, int, float, bool, type(None), list, dict)
        if name in COUNTS:
            kinds = (int,)
        elif name == "learning_rate":
            kinds = (int, float)
        elif name in ("data", "tokenizer"):
            kinds = (str,)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        flat = not any(isinstance(each, list | dict) for each in inside)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or not flat:
            raise ValueError(f"{where}.{name} is {shown(value)}; expected {' or '.join(map(in_words, kinds))}")
        if name in COUNTS and isinstance(value, int) and not 0 < value < SIZE[1]:
            raise ValueError(f"{where}.{name} is {shown(value)}; it must be greater than 0")


def rates(tuning: StoredTuning) -> dict[float, float]:
    """Losses by learning rate; infinite where it diverged."""
    return {float(rate): math.inf if loss is None else loss for rate, loss in tuning.losses.items()}
