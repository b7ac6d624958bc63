"""What `results.json` keeps of a run, small enough to be sent around: pages and tables are made from it alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from .history import Curve, History, smoothed, smoothing

State = Literal["finished", "diverged", "unfinished"]
EVALUATION = ("step", "tokens", "seconds", "loss", "bits_per_byte", "accuracy", "drop_gap")
POINTS = 200  # of the training curve at most
FIGURES = 10_000  # about the routers at most, whatever the number of experts, layers and lines
LINES = 60  # about each router at most


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, its curves thinned and its figures rounded."""

    model: str
    seed: int
    state: State
    evaluation: Sequence[dict[str, float]]
    """lines of `EVALUATION`: tokens trained on, seconds of work, held-out loss in nats per token, dropless; `drop_gap`
    is what the capacity limits of training would add to it, where there are any"""
    training: Curve
    """smoothed language-model loss of the training batches, without auxiliary losses"""
    router: Sequence[dict[str, Any]]
    """{"step", "layers": [{"name", "load", "entropy", "dropped", "balance", "dead"}]}: means over the steps since the
    line before; load is each expert's, in times of its even share, entropy in nats"""
    tokens_per_second: float
    """median over the run: the first lines hold compilation and the machine's other work"""
    peak_memory: float | None = None
    """bytes, on a GPU"""

    @classmethod
    def condensed(cls, model: str, seed: int, state: State, history: History, steps: int) -> Self:
        """What is kept of a history; `steps` are those of the whole run."""
        evaluation = [
            {key: round(line[key], 6) for key in EVALUATION if line.get(key) is not None} for line in history.evaluation
        ]
        training = smoothed(history.curve("train", "loss"), smoothing(steps))
        return cls(
            model,
            seed,
            state,
            evaluation,
            [(step, round(loss, 5)) for step, loss in thinned(training, POINTS)],
            _router(history.router),
            statistics.median([speed for _, speed in history.curve("train", "tokens_per_second")] or [math.nan]),
            max((peak for _, peak in history.curve("train", "peak_memory")), default=None),
        )

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def curve(self) -> Curve:
        """Held-out loss in nats per token, by step."""
        return [(line["step"], line["loss"]) for line in self.evaluation]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists of numbers instead of lines."""
        layers = self.router[0]["layers"] if self.router else []
        return {
            "model": self.model,
            "seed": self.seed,
            "state": self.state,
            "tokens_per_second": None if math.isnan(self.tokens_per_second) else self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "evaluation": {
                key: [line.get(key) for line in self.evaluation]
                for key in EVALUATION
                if any(key in line for line in self.evaluation)
            },
            "training": {"step": [s for s, _ in self.training], "loss": [loss for _, loss in self.training]},
            "router": {
                "step": [line["step"] for line in self.router],
                "layers": [
                    {
                        key: layers[k][key] if key == "name" else [line["layers"][k][key] for line in self.router]
                        for key in layer
                    }
                    for k, layer in enumerate(layers)
                ],
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The run that `to_dict` wrote down; raises KeyError if something is missing."""
        speed, router = values["tokens_per_second"], values["router"]
        evaluation = values["evaluation"]
        return cls(
            values["model"],
            values["seed"],
            values["state"],
            [
                {key: column[k] for key, column in evaluation.items() if column[k] is not None}
                for k in range(len(evaluation.get("step", ())))
            ],
            list(zip(values["training"]["step"], values["training"]["loss"], strict=True)),
            [
                {
                    "step": step,
                    "layers": [
                        {key: value if key == "name" else value[k] for key, value in layer.items()}
                        for layer in router["layers"]
                    ],
                }
                for k, step in enumerate(router["step"])
            ],
            math.nan if speed is None else speed,
            values["peak_memory"],
        )


def thinned(curve: Curve, most: int) -> list[tuple[float, float]]:
    """At most so many points of a curve, evenly spread, the last among them."""
    every = -(-len(curve) // most) or 1
    return list(reversed(list(reversed(curve))[::every]))


def _router(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Router lines of `metrics.jsonl`, neighbours averaged until they are few enough."""
    if not lines:
        return []
    figures = sum(len(layer["load"]) + 4 for layer in lines[0]["layers"])
    every = -(-len(lines) // max(2, min(LINES, FIGURES // figures)))
    parts = [lines[k : k + every] for k in range(0, len(lines), every)]
    return [
        {
            "step": part[-1]["step"],
            "layers": [_layer(at) for at in zip(*(line["layers"] for line in part), strict=True)],
        }
        for part in parts
    ]


def _layer(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One router's mean over several lines."""
    load = [statistics.fmean(shares) for shares in zip(*(line["load"] for line in lines), strict=True)]
    means = {key: round(statistics.fmean(line[key] for line in lines), 4) for key in ("entropy", "dropped", "balance")}
    return {
        "name": lines[0]["name"],
        "load": [round(share * len(load), 2) for share in load],
        **means,
        "dead": load.count(0.0),
    }
