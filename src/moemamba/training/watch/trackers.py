"""Programs that show the lines of metrics.jsonl while they come: TensorBoard, trackio, Weights & Biases."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ...reading import to_dict
from ..config import TrainConfig
from .tensorboard import TensorBoard, figures, require_tensorboard

PROJECT = "moemamba"


class Board(Protocol):
    """What shows a run."""

    name: str
    """for a message that it shows no more"""

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl. An OSError ends what is shown, and nothing else."""

    def close(self) -> None:
        """The run has ended, or stops for now."""


class Tracker:
    """A run in trackio or in Weights & Biases, which are called alike.

    Args:
        program: "trackio" or "wandb".
        run: the directory of the run, whose path is its name.
        step: where it goes on; 0 for a new one.
    """

    def __init__(self, program: str, config: TrainConfig, run: Path, step: int):
        self.name = program
        self._program: Any = _program(program)
        named = {"project": PROJECT, "name": "-".join(run.resolve().parts[-2:]), "config": to_dict(config)}
        own = {"dir": str(run)} if program == "wandb" else {}
        with _reported(program):
            self._program.init(**named, **own, resume="allow" if step else "never")

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Every number of a line, named as in TensorBoard."""
        if found := figures(kind, values):
            with _reported(self.name):
                self._program.log(found, step=values["step"])

    def close(self) -> None:
        """Sends the rest."""
        with _reported(self.name):
            self._program.finish()


class _reported:
    """What a program raises of its own is an OSError: its server or its files cannot be reached."""

    def __init__(self, program: str):
        self.program = program

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise OSError(f"{self.program}: {str(error).strip() or type(error).__name__}") from error


def open_board(config: TrainConfig, run: Path, step: int) -> Board | None:
    """What a run asks for; None if nothing. Raises OSError if it cannot begin."""
    match _asked(config):
        case "none":
            return None
        case "tensorboard":
            return TensorBoard(run / "tensorboard", step)
        case "trackio" | "wandb" as program:
            return Tracker(program, config, run, step)
    raise AssertionError(config.track)


def require_board(config: TrainConfig) -> None:
    """Raises ValueError, before any work, if what a run asks for is not installed."""
    match _asked(config):
        case "tensorboard":
            require_tensorboard()
        case "trackio" | "wandb" as program:
            _program(program)


def _asked(config: TrainConfig) -> str:
    return "tensorboard" if config.tensorboard and config.track == "none" else config.track


def _program(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be used ({error}); pip install 'moemamba[{name}]', or leave --track out"
        ) from error
