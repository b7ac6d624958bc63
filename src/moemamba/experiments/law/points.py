"""Comparisons as points of a scaling law: size, tokens, experts and loss of every model that finished."""

from collections.abc import Sequence
from typing import NamedTuple

from ...config import ModelConfig
from ...counting import count_parameters
from ..results import Comparison


class Point(NamedTuple):
    """A finished model."""

    name: str
    active: float
    """parameters, without embedding and head"""
    tokens: float
    experts: float
    """for each that a token visits; 1 of a dense model"""
    loss: float
    """nats a token, mean over seeds"""
    d_model: int
    learning_rate: float
    batch_tokens: int


def points(comparisons: Sequence[Comparison]) -> tuple[list[Point], str]:
    """The points of comparisons on one text, and which loss they have: of the test where all runs have one.

    Raises:
        ValueError: texts or tokenizers differ, so that losses do.
    """
    for name in ("data", "tokenizer"):
        values = sorted({str(found.settings[name]) for found in comparisons})
        if len(values) > 1:
            raise ValueError(
                f"{name} is {values[0]} in one comparison and {values[1]} in another, so that their losses are not of "
                "one law; fit comparisons on one text"
            )
    rows = [(found, row) for found in comparisons for row in found.rows if row.loss.values]
    tested = bool(rows) and all(len(row.test.values) == len(row.loss.values) for _, row in rows)
    found_points = [
        Point(
            row.name,
            row.parameters.active,
            row.steps * found.step_tokens,
            expansion(row.config),
            (row.test if tested else row.loss).mean,
            row.config.d_model,
            float(found.setting(row.name, "learning_rate")),
            found.step_tokens,
        )
        for found, row in rows
    ]
    return found_points, "test" if tested else "held-out"


def expansion(model: ModelConfig) -> float:
    """E: parameters of experts for each that a token passes through; 1 without experts."""
    if not model.routers:
        return 1.0
    one, two = (count_parameters(model.replace(n_experts=2, top_k=k)).active for k in (1, 2))
    expert = two - one
    used = expert * model.routers[0].top_k
    total = count_parameters(model)
    return (total.total - total.active + used) / used
