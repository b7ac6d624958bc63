"""A run measured on text that it does not train on: while it trains, and once, on another, at its end."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..data.windows import HeldOut
from ..distributed import Processes
from ..host.progress import Report
from ..layers.parts import Parts
from ..model import MoEMamba
from .config import TrainConfig
from .evaluate import BLOCKS, Evaluation, evaluate
from .run import RunDirectory
from .spread import routing_groups, rows_of
from .update import Average


def measured(
    model: MoEMamba,
    average: Average | None,
    texts: Sequence[HeldOut],
    config: TrainConfig,
    dtype: torch.dtype,
    processes: Processes,
    sequence: Parts | None,
    most: int | None,
    blocks: int | None = None,
) -> Evaluation:
    """The model of a run on some texts, with its averaged weights besides if it has some; see `evaluate`."""
    rows = rows_of(config, processes.size)

    def one(drop_gap: bool, blocks: int | None) -> Evaluation:
        return evaluate(
            model,
            texts,
            context=config.context,
            batch_size=rows,
            most=most,
            reset_state=config.reset_state,
            dtype=dtype,
            drop_gap=drop_gap,
            group=min(rows, config.batch_size // routing_groups(config, processes.size)),
            processes=processes,
            blocks=blocks,
            sequence=sequence,
        )

    found = one(any(experts.capacity_factor is not None for experts in config.model.routers), blocks)
    if average is None:
        return found
    with average.in_place():
        return replace(found, averaged=one(False, None).loss)


def tested_once(
    run: RunDirectory,
    report: Report,
    model: MoEMamba,
    average: Average | None,
    texts: Sequence[HeldOut],
    config: TrainConfig,
    dtype: torch.dtype,
    processes: Processes,
    sequence: Parts | None,
) -> Evaluation | None:
    """Test a finished run, once, on all of a text that nothing was chosen by, or on `test_tokens` of it; None if that
    has been done, or if what is held out has no two windows."""
    if processes.once(lambda: run.log.find("test", config.steps)):
        return None
    if not texts:
        run.log("test", step=config.steps, text="what is held out has too few windows for two halves")
        return None
    found = measured(model, average, texts, config, dtype, processes, sequence, config.test_tokens, BLOCKS)
    run.log("test", step=config.steps, **found.to_dict())
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f} over its parts"
    smooth = "" if found.averaged is None else f", {found.averaged:.4f} with averaged weights"
    report.note(f"test loss {found.loss:.4f}{error}{smooth}, {found.tokens:,} tokens{apart(found)}")
    return found


def apart(found: Evaluation) -> str:
    """Of several texts, the loss of each, in words."""
    return "".join(f"; {name} {loss:.4f}" for name, loss in (found.apart or {}).items())
