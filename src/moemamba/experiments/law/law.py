"""The joint scaling law of dense models and mixtures of experts (Ludziejewski et al., arXiv 2502.05172).

L(N, D, E) = a E^d N^(alpha + g ln E) + b E^w D^(beta + z ln E) + c, in nats a token: N active parameters without
embedding and head, D tokens of training, E experts for each that a token visits (1 for a dense model). The paper puts a
bounded transform of E in its place; here E is as it is, so that the law must not be taken far beyond the E it saw.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...host.files import FileError, read_json, write_json
from ...reading import from_dict, validate

FORMAT = 1


@dataclass(frozen=True)
class Anchor:
    """A model of the fit from which learning rate and batch of others are scaled."""

    experts: float
    """E"""
    d_model: int
    learning_rate: float
    batch_tokens: int
    """of a step"""
    tokens: float
    """of its longest run"""

    def __post_init__(self) -> None:
        validate(self, positive=("experts", "d_model", "learning_rate", "batch_tokens", "tokens"))


@dataclass(frozen=True)
class Fitted:
    """What a law was fitted to, and how well; residuals in nats."""

    points: int
    models: int
    residual: float
    """root of the mean square over all points"""
    largest: float
    """residual of all points"""
    held_out: float
    """root of the mean square over models that were left out, one at a time, and predicted by the rest"""
    held_out_largest: float
    active: tuple[float, ...]
    """least and largest N"""
    tokens: tuple[float, ...]
    """least and largest D"""
    experts: tuple[float, ...]
    """least and largest E"""
    data: str
    tokenizer: str
    measure: str
    """which loss: "test", or "held-out" where runs have no test"""

    def __post_init__(self) -> None:
        validate(self, positive=("points", "models"), not_negative=("residual", "largest", "held_out"))
        for name in ("active", "tokens", "experts"):
            span = getattr(self, name)
            if len(span) != 2 or not 0 < span[0] <= span[1]:
                raise ValueError(f"{name} is {span}; expected the least and the largest, greater than 0")


@dataclass(frozen=True)
class Law:
    """A fitted law; the letters are those of this module's formula."""

    a: float
    d: float
    alpha: float
    g: float
    b: float
    w: float
    beta: float
    z: float
    c: float
    fitted: Fitted
    anchors: tuple[Anchor, ...]

    def __post_init__(self) -> None:
        validate(self, not_negative=("a", "b", "c"))
        if not self.anchors:
            raise ValueError("anchors is empty; expected a model from which rate and batch are scaled")

    def loss(self, active: float, tokens: float, experts: float = 1.0) -> float:
        """Expected nats a token.

        Raises:
            ValueError: a number that is not greater than 0, or so large that the law says nothing.
        """
        for name, value in (("active", active), ("tokens", tokens), ("experts", experts)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")
        e = math.log(experts)
        try:
            size = self.a * math.exp(self.d * e + (self.alpha + self.g * e) * math.log(active))
            text = self.b * math.exp(self.w * e + (self.beta + self.z * e) * math.log(tokens))
        except OverflowError:
            raise ValueError(f"the law says nothing of {active:g} parameters and {tokens:g} tokens") from None
        return size + text + self.c

    def beyond(self, active: float, tokens: float, experts: float) -> list[str]:
        """Where a question lies outside what the law was fitted to, in words."""
        found = []
        values = {"active parameters": active, "tokens": tokens, "experts for each that a token visits": experts}
        for (name, value), (low, high) in zip(
            values.items(), (self.fitted.active, self.fitted.tokens, self.fitted.experts), strict=True
        ):
            if value > 1.02 * high:
                found.append(f"{value / high:.3g} times the most {name} that it was fitted to")
            elif value < low / 1.02:
                found.append(f"{low / value:.3g} times fewer {name} than it was fitted to")
        return found


def read_law(file: Path) -> Law:
    """A law that `write_law` wrote.

    Raises:
        ValueError: it is something else, or a field holds what it cannot; both are named.
        OSError: there is none.
    """
    values = read_json(file)
    if values.get("format") != FORMAT:
        raise FileError(f"{file} is no scaling law of format {FORMAT}; write one with moemamba plan --fit")
    return from_dict(Law, {name: value for name, value in values.items() if name != "format"}, str(file))


def write_law(law: Law, file: Path) -> None:
    """As JSON, at once or not at all."""
    values: dict[str, Any] = {"format": FORMAT} | asdict(law)
    write_json(file, values)
