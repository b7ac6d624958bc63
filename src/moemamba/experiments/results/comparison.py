"""A comparison's figures as one value, and as `results.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...host.files import FileError, read_json, replace
from ...reading import shown
from .record import RunResult
from .reproduction import Reproduction
from .row import Row, summarise
from .stored import stored

FORMAT = 2  # of results.json
SIZE = 1 << 26  # of its bytes at most; a run takes about 60 kB


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found, for its table, `results.json` and report."""

    rows: list[Row]
    """the first is the baseline"""
    runs: list[RunResult]
    settings: dict[str, Any]
    """what all runs share: data, budget, schedule"""
    recipes: dict[str, dict[str, Any]]
    """by model, the settings in which it differs from `settings`"""
    environment: dict[str, str]
    command: str | None
    paper: Reproduction | None = None

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return int(self.settings["batch_size"] * self.settings["context"])

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the corpus that all runs read; None if none of them says."""
        return next((run.train_tokens for run in self.runs if run.train_tokens), None)

    def epochs(self, row: Row) -> float | None:
        """How often a model's runs read the corpus."""
        return row.steps * self.step_tokens / self.train_tokens if self.train_tokens and row.steps else None

    def setting(self, model: str, name: str) -> Any:
        """One model's value of a setting, such as its learning rate."""
        return self.recipes.get(model, {}).get(name, self.settings[name])

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": self.command,
            "settings": self.settings,
            "recipes": self.recipes,
            "environment": self.environment,
            "paper": self.paper.to_dict() if self.paper else None,
            "baseline": self.rows[0].name,
            "models": [row.to_dict() for row in self.rows],
            "runs": [run.to_dict() for run in self.runs],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `to_dict` wrote down, its figures counted again from the runs.

        Raises:
            ValueError: it is not of this format.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"its format is {shown(values.get('format'))}, not {FORMAT}; run its command again where the runs are"
            )
        found = stored(values)
        runs = [RunResult.of(run) for run in found.runs]
        models = {model.name: model.config for model in found.models}
        return cls(
            summarise(runs, models, found.settings["context"]),
            runs,
            found.settings,
            found.recipes,
            found.environment,
            found.command,
            Reproduction.of(found.paper) if found.paper else None,
        )

    def write(self, path: Path) -> None:
        """As JSON, a line for each model and run; an older file is replaced when this one is complete."""
        lines = []
        for key, value in self.to_dict().items():
            text = json.dumps(value, separators=(",", ":"))
            if key in ("models", "runs"):
                text = "[\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in value) + "\n]"
            lines.append(f"{json.dumps(key)}: {text}")
        replace(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_results(path: Path) -> Comparison:
    """The comparison of a `results.json`, or of the folder that holds it.

    Raises:
        ValueError: the file is something else, or one of its fields holds what it cannot; both are named.
        OSError: there is none.
    """
    file = path / "results.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FileNotFoundError(f"{path} holds no results.json; name the folder of a comparison, or its results.json")
    if not path.exists():
        raise FileNotFoundError(f"there is no comparison at {path}; name the folder of one, or its results.json")
    values = read_json(file, SIZE)
    try:
        return Comparison.from_dict(values)
    except ValueError as error:
        raise FileError(f"{file} is not a comparison's results.json that this version can read: {error}") from None
