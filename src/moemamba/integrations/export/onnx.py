"""A step of generation as an ONNX model or a program of torch.export, with its state going in and out."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ...model import MoEMamba
from .step import Step, program


def write_onnx(file: Path, model: MoEMamba) -> None:
    """An ONNX model: `tokens` (rows,) int64 and `state.N.FIELD` -> `logits` (rows, v) and `next.N.FIELD`.

    The state begins as zeros; its shapes stand in the metadata `state`. Weights of more than 1.5 GB lie in a file
    beside it.

    Raises:
        ValueError: the packages onnx and onnxscript are not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs its packages ({error}); pip install 'moemamba[onnx]'") from error
    step = Step(model)
    tokens, state = torch.zeros(3, dtype=torch.int64), step.empty(3)
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    with _quiet():
        made: Any = torch.onnx.export(
            program(step),
            (tokens, *state),
            dynamo=True,
            verbose=False,
            input_names=["tokens", *(f"state.{name}" for name in step.names)],
            output_names=["logits", *(f"next.{name}" for name in step.names)],
            dynamic_shapes=({0: rows}, tuple({0: rows} for _ in state)),
        )
    made.model.metadata_props["state"] = json.dumps(dict(zip(step.names, step.shapes, strict=True)))
    size = sum(parameter.numel() * 4 for parameter in step.parameters())
    made.save(str(file), external_data=size > 1_500_000_000)


def write_program(file: Path, model: MoEMamba) -> None:
    """What `torch.export.load` reads without this package: `program.module()(tokens, *state)`."""
    step = Step(model)
    shapes = json.dumps(dict(zip(step.names, step.shapes, strict=True)))
    with _quiet():
        torch.export.save(program(step), file, extra_files={"state": shapes})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own operations."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
