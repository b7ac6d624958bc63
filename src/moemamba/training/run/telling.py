"""What a run says of itself while it goes: lines of metrics.jsonl, and of its report."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch

from ... import ops
from ...counting import count_parameters
from ...data.batches import Batches
from ...data.corpora import Corpora
from ...distributed import Processes
from ...host.progress import Report
from ..config import TrainConfig
from ..evaluate import Evaluation
from ..update import Diverged, Failed, Fatal, Guard, captures
from ..watch import Alarms, Meter, sentences
from .directory import RunDirectory
from .position import Position


def introduce(
    report: Report, config: TrainConfig, corpora: Corpora, processes: Processes, dtype: torch.dtype, position: Position
) -> None:
    """The lines that begin a run's output."""
    count = count_parameters(config.model)
    tokens = config.steps * config.batch_size * config.context
    corpora.introduce(report, tokens)
    report.note(
        f"{'model':10}{config.model.pattern} x {config.model.n_blocks}, {count.total:,} parameters, {count.active:,} "
        f"active, and {count.embedding:,} for a vocabulary of {config.model.vocab_size:,}"
    )
    device = processes.device.type if processes.size > 1 else processes.device
    backend = ops.choose("selective_scan", torch.empty(0, device=processes.device))
    graph = ", steps as a CUDA graph" if captures(config, processes) else ""
    report.note(f"{'device':10}{device}, {str(dtype).removeprefix('torch.')}, {backend} kernels{graph}")
    if processes.size > 1:
        spread = f", experts over {config.expert_parallel}" if config.expert_parallel > 1 else ""
        what = "parameters shared out" if config.shard == "parameters" else "parameters in each"
        parts = f", sequences over {config.sequence_parallel}" if config.sequence_parallel > 1 else ""
        report.note(f"{'processes':10}{processes.size}, {what}{spread}{parts}")
    at = f"from step {position.step:,} of " if position.step else ""
    report.note(f"{'run':10}{config.run}, {at}{config.steps:,} steps, {tokens:,} tokens")


def skipped_steps(run: RunDirectory, report: Report, batches: Batches, guard: Guard, processes: Processes) -> int:
    """Read and write down which steps failed since the last line; returns how many.

    Raises:
        Diverged: one of them stops the run.
    """
    try:
        failed = guard.read()
    except Fatal as fatal:
        *failed, last = fatal.failed
        _log_skips(run, batches, failed)
        row = f", failure {guard.in_a_row} in a row" if guard.in_a_row > 1 else ""
        return processes.once(partial(diverged, run, batches, last.step, f"{last}{row}"))
    _log_skips(run, batches, failed)
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        report.note(f"skipped: {failed[0]}{more}; {guard.in_all:,} skipped in all")
    return len(failed)


def _log_skips(run: RunDirectory, batches: Batches, failed: Sequence[Failed]) -> None:
    for skip in failed:
        figures = {"loss": skip.loss, "grad_norm": skip.grad_norm}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        run.log("skip", step=skip.step, **finite, **_identity(batches, skip.step))


def diverged(run: RunDirectory, batches: Batches, step: int, what: str) -> NoReturn:
    """Write down which batch the step read, and raise; the checkpoints are all older than it."""
    run.log("failure", step=step, **_identity(batches, step))
    raise Diverged(
        f"{what}; the windows it read are in {run.log.file}, and the checkpoints are from before; resume with "
        'on_failure="skip", or begin a new run with a lower learning_rate or clip, or a longer warmup'
    )


def _identity(batches: Batches, step: int) -> dict[str, Any]:
    """Which text the batch of a step was."""
    return {"windows": batches.chosen(step - 1).tolist(), "context": batches.context}


def log_routers(run: RunDirectory, report: Report, alarms: Alarms, meter: Meter, step: int, skipped: int) -> None:
    line = meter.router_line(step, skipped)
    run.log("router", **line)
    raised = alarms.look(line["layers"], meter.steps - skipped)
    for alarm in raised:
        run.log("alarm", step=step, **alarm)
    for sentence in sentences(step, raised):
        report.warn(sentence)


def log_evaluation(
    run: RunDirectory, report: Report, config: TrainConfig, step: int, found: Evaluation, seconds: float
) -> None:
    """What an evaluation found; its tokens are those trained on, as in every line."""
    tokens = step * config.batch_size * config.context
    run.log("evaluation", **found.to_dict() | {"step": step, "tokens": tokens, "seconds": round(seconds, 3)})
    spelled = found.bits_per_byte == found.bits_per_byte  # else nan
    bits = f", {found.bits_per_byte:.3f} bits per byte" if spelled else ""
    smooth = "" if found.averaged is None else f", {found.averaged:.4f} with averaged weights"
    apart = "".join(f"; {name} {loss:.4f}" for name, loss in (found.apart or {}).items())
    report.note(f"step {step:,}: held-out loss {found.loss:.4f}{bits}{smooth}{apart}")
