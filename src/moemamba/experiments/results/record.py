"""What `results.json` keeps of a run, small enough to be sent around: pages and tables are made from it alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ...reading import from_dict
from .history import Curve, History, smoothed, smoothing
from .stored import Layer, Status, StoredRun, is_figure
from .tested import Test

EVALUATION = ("step", "tokens", "seconds", "loss", "bits_per_byte", "accuracy", "drop_gap", "averaged")
MEANS = ("entropy", "dropped", "balance")  # of a router, over steps
POINTS = 200  # of the training curve at most
FIGURES = 10_000  # about the routers at most, whatever the number of experts, layers and lines
LINES = 60  # about each router at most


@dataclass(frozen=True)
class RunResult:
    """One training run of a comparison, its curves thinned and its figures rounded."""

    model: str
    seed: int
    status: Status
    evaluation: Sequence[dict[str, float]]
    """lines of `EVALUATION`: tokens trained on, seconds of work, held-out loss in nats per token, dropless; `drop_gap`
    is what the capacity limits of training would add to it, where there are any; `averaged` the loss of averaged
    weights, where there are some"""
    training: Curve
    """smoothed language-model loss of the training batches, without auxiliary losses"""
    router: Sequence[dict[str, Any]]
    """{"step", "layers": [{"name", "load", "entropy", "dropped", "balance", "dead"}]}: means over the steps since the
    line before; load is each expert's, in times of its even share, entropy in nats"""
    tokens_per_second: float
    """median over the run: the first lines hold compilation and the machine's other work"""
    peak_memory: float | None = None
    """bytes, on a GPU"""
    train_tokens: int | None = None
    """of its corpus; None if the run did not write it down"""
    test: Test | None = None
    """of a finished run that has one"""

    @classmethod
    def condensed(cls, model: str, seed: int, status: Status, history: History, steps: int) -> Self:
        """What is kept of a history; `steps` are those of the whole run."""
        evaluation = [
            {key: round(line[key], 6) for key in EVALUATION if is_figure(line.get(key))}
            for line in history.evaluation
            if is_figure(line.get("loss"))
        ]
        if status == "finished" and (not evaluation or evaluation[-1]["step"] != history.evaluation[-1]["step"]):
            status = "diverged"  # its last loss is no number
        training = smoothed(history.curve("train", "loss"), smoothing(steps))
        return cls(
            model,
            seed,
            status,
            evaluation,
            [(step, round(loss, 5)) for step, loss in thinned(training, POINTS)],
            _router(history.router),
            statistics.median(
                [speed for _, speed in history.curve("train", "tokens_per_second") if speed > 0] or [math.nan]
            ),
            max((peak for _, peak in history.curve("train", "peak_memory")), default=None),
            next((int(tokens) for _, tokens in history.curve("data", "train_tokens") if tokens >= 1), None),
            Test.condensed(history.test, evaluation[-1]["step"]) if status == "finished" and evaluation else None,
        )

    @property
    def finished(self) -> bool:
        return self.status == "finished"

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
            "state": self.status,
            "tokens_per_second": None if math.isnan(self.tokens_per_second) else self.tokens_per_second,
            "peak_memory": self.peak_memory,
            **({"train_tokens": self.train_tokens} if self.train_tokens else {}),
            **({"test": self.test.to_dict()} if self.test else {}),
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
        """The run that `to_dict` wrote down; raises ValueError if a field is missing or cannot be."""
        return cls.of(from_dict(StoredRun, values, "run"))

    @classmethod
    def of(cls, run: StoredRun) -> Self:
        """A checked run of `results.json`: lines instead of columns."""
        columns = {key: column for key in EVALUATION if (column := getattr(run.evaluation, key))}
        return cls(
            run.model,
            run.seed,
            run.state,
            [
                {key: column[k] for key, column in columns.items() if column[k] is not None}
                for k in range(len(run.evaluation.step))
            ],
            list(zip(run.training.step, run.training.loss, strict=True)),
            [
                {"step": step, "layers": [_line(layer, k) for layer in run.router.layers]}
                for k, step in enumerate(run.router.step)
            ],
            math.nan if run.tokens_per_second is None else run.tokens_per_second,
            run.peak_memory,
            run.train_tokens,
            Test.of(run.test) if run.test else None,
        )


def _line(layer: Layer, k: int) -> dict[str, Any]:
    """What one router did up to a step."""
    means = {key: getattr(layer, key)[k] for key in (*MEANS, "dead")}
    return {"name": layer.name, "load": list(layer.load[k]), **means}


def thinned(curve: Curve, most: int) -> list[tuple[float, float]]:
    """At most so many points of a curve, evenly spread, the last among them."""
    every = -(-len(curve) // most) or 1
    return list(reversed(list(reversed(curve))[::every]))


def _router(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Router lines of `metrics.jsonl`, neighbours averaged until they are few; only those shaped like the last."""
    shapes = [_shape(line) for line in lines]
    last = next((shape for shape in reversed(shapes) if shape), None)
    lines = [line for line, shape in zip(lines, shapes, strict=True) if shape == last]
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


def _shape(line: dict[str, Any]) -> list[tuple[str, int]]:
    """Name and number of experts of each router that a line tells of; empty if it does not tell what it should."""
    layers = line.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return []
    for layer in layers:
        load = layer.get("load")
        figures = [*load, *(layer.get(key) for key in MEANS)] if isinstance(load, list) and load else [None]
        if not isinstance(layer.get("name"), str) or not all(map(is_figure, figures)):
            return []
    return [(layer["name"], len(layer["load"])) for layer in layers]


def _layer(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One router's mean over several lines."""
    load = [statistics.fmean(shares) for shares in zip(*(line["load"] for line in lines), strict=True)]
    means = {key: round(statistics.fmean(line[key] for line in lines), 4) for key in MEANS}
    return {
        "name": lines[0]["name"],
        "load": [round(share * len(load), 2) for share in load],
        **means,
        "dead": load.count(0.0),
    }
