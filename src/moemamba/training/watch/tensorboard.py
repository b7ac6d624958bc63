"""The lines of metrics.jsonl as TensorBoard's scalars."""

from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes event files into a folder.

    Args:
        folder: of the event files; `tensorboard --logdir` shows those of all runs below a folder.
        step: what was written about later steps is void: the run was resumed from there.
    """

    name = "TensorBoard's file"

    def __init__(self, folder: Path, step: int = 0):
        self._writer: Any = require_tensorboard()(str(folder), purge_step=step + 1 if step else None)

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl: every number of it, those of routers under their layer's name."""
        for name, value in figures(kind, values).items():
            self._writer.add_scalar(name, value, values["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and close the file."""
        self._writer.close()


def figures(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: "train/loss", "router/layers.1.branches.0/entropy"."""
    found = {f"{kind}/{name}": value for name, value in values.items() if _number(value) and name != "step"}
    for layer in values.get("layers", ()):
        own = {name: value for name, value in layer.items() if _number(value)}
        own |= {"load/least": min(layer["load"]), "load/most": max(layer["load"])}
        found |= {f"{kind}/{layer['name']}/{name}": value for name, value in own.items()}
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def require_tensorboard() -> Any:
    """PyTorch's SummaryWriter; raises ValueError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard cannot be used ({error}); pip install 'moemamba[tensorboard]', or leave tensorboard=True out"
        ) from error
    return SummaryWriter
