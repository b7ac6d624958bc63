"""The training loop: batches, loss, gradients, update; evaluation and checkpoints on the way."""

import math
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from .. import ops
from ..counting import count_parameters
from ..data.batches import Batches
from ..data.corpora import Corpora, find_tokenizer, open_corpora
from ..distributed import Agreement, Processes, join, sources
from ..host.progress import Report
from ..host.stop import Interrupted, Stop
from ..model import MoEMamba
from .config import TrainConfig, absolute
from .evaluate import Evaluation, evaluate
from .run import (
    Position,
    RunDirectory,
    Saver,
    admit,
    begin,
    go_on_longer,
    plant,
    read_model,
    restore,
    take,
    write,
)
from .spread import build, require_fit, routing_groups
from .update import Average, Diverged, Failed, Fatal, Guard, Step, captures, learning_rate, optimizer_of
from .watch import Alarms, Meter, open_board, peak_flops, require_board, sentences


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run: Path
    model: MoEMamba
    """in evaluation mode; of several processes, this one's part"""
    step: int
    loss: float | None
    """mean training loss of the last steps, in nats a token"""
    evaluation: Evaluation | None
    """the last one"""


def train(
    config: TrainConfig,
    resume: bool | Literal["auto"] = False,
    *,
    stop: int | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Train a model in a run directory; with the processes that `torchrun` started, if it did.

    Args:
        resume: continue the run in `config.run` from its newest checkpoint, exactly as if it had never stopped;
            "auto": continue it if it has begun, and begin it otherwise. With more `config.steps` than before it goes on
            longer, its schedule stretched to them.
        stop: save and return after this step; a later call resumes.
        report: where progress is shown; standard output if None.
    Raises:
        ValueError: data or configuration that cannot work, or a resumed run whose configuration or data differ.
        Diverged: the loss, its gradient or an evaluation is not finite, or the gradient spiked, as `config` has it.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP came; the step was finished and saved. A second signal ends
            at once.
        OSError: the run directory holds a run already, another process trains in it, or it cannot be written.
    """
    config = absolute(config)
    if not config.run:
        raise ValueError("run names no directory; say where the run shall lie: --run runs/mine")
    with join(config.device, config.timeout) as processes, closing(RunDirectory(config.run)) as run:
        return _train(run, config, resume, stop, report or Report(), processes)


def _train(
    run: RunDirectory,
    config: TrainConfig,
    resume: bool | Literal["auto"],
    stop: int | None,
    report: Report,
    processes: Processes,
) -> TrainResult:
    report = report if processes.first else Report(silent=True)
    run.log.writes = processes.first
    require_board(config)
    captures(config, processes)  # raises before any work
    require_fit(config, processes)
    resume = _resumes(run, resume, processes)
    if processes.size > 1:
        processes.alike((torch.__version__, sources()), "versions of PyTorch or sources of moemamba")
    begun, config, tokenizer = processes.once(lambda: admit(run, config, resume, processes.size))
    if processes.first and not run.lock.holds:
        report.warn(f"{run.path} cannot be locked on this file system; see that no other process trains in it")
    text = config.reads()
    corpora = processes.first_of_machine_first(lambda: open_corpora(text, tokenizer, report))
    processes.alike(corpora.content, "training tokens")
    parts = config.accumulate
    rows = corpora.rows(text)
    every_rank = Batches(rows, config.batch_size)
    batches = Batches(rows, config.batch_size // (parts * processes.size), processes.rank, processes.size)
    dtype = _dtype(config, processes.device)
    model = build(config, processes, dtype)
    optimizer = optimizer_of(model, config)
    average = Average(model, config.average) if config.average else None
    if not resume:
        processes.once(lambda: begin(run, config, tokenizer, corpora.content))
        run.log("data", step=0, train_tokens=corpora.train_tokens)
    if config.branch:
        processes.once(lambda: plant(run, Path(str(config.branch))))
    position = Position(content=corpora.content)
    if resume or config.branch:
        position = restore(run, model, optimizer, corpora.content, report.note, processes, config.steps, average)
    if config.start and not position.step:
        read_model(Path(config.start), model)
        if average:
            average.begin()
    position, said = processes.once(lambda: (position, go_on_longer(run, config, position, begun)))
    _introduce(report, config, corpora, processes, dtype, position)
    if said:
        report.note(f"{'schedule':10}{said}")

    if config.compile:
        torch.compiler.reset()  # of models trained earlier in this process, which count towards a function's limit
        model.compile_layers()
    last = config.steps if stop is None else min(stop, config.steps)
    peak = peak_flops(processes.device, dtype)
    meter = Meter(config, model.router_names, position.seconds, peak and peak * processes.size)
    guard = Guard(config, processes.device, position.skips)
    signals = Stop()
    agreement = Agreement(signals, processes)
    update = Step(model, optimizer, config, dtype, guard, processes, report.warn, agreement, average)
    alarms = Alarms([experts.top_k for experts in config.model.routers], position.alarms)
    if processes.first:
        run.log.board = open_board(config, run.path, position.step)
    saver = Saver()
    model.train()
    report.begin("training", config.steps, position.step)
    with signals, _closing(report, run, saver):
        for step in range(position.step + 1, last + 1):
            rate = learning_rate(config, step - 1, position.warmup)
            batch = [batches[(step - 1) * parts + part] for part in range(parts)]
            meter.add(*update(step, batch, rate))
            position.step = step
            signalled = agreement.number()
            saves = step == last or step % config.save_every == 0 or signalled > 0
            evaluates = step == config.steps or step % config.eval_every == 0
            if not (saves or evaluates or step % config.log_every == 0):
                continue
            skipped = _skipped(run, report, every_rank, guard, processes)
            if skipped < meter.steps:
                line = meter.train_line(step, rate, skipped)
                position.loss = line["loss"]
                run.log("train", **line)
                if meter.names:
                    _log_routers(run, report, alarms, meter, step, skipped)
                speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                report.update(step, f"step {step:,} of {config.steps:,}: loss {line['loss']:.3f}, {speed}")
            if lost := report.lost():
                run.log("note", step=step, text=f"progress is no longer shown ({lost}); the run goes on")
            if evaluates:
                found = _evaluate(model, corpora, config, dtype, processes)
                if average:
                    with average.in_place():
                        averaged = _evaluate(model, corpora, config, dtype, processes, drop_gap=False)
                    found = replace(found, averaged=averaged.loss)
                if not math.isfinite(found.loss):
                    what = f"the held-out loss is not finite after step {step:,}"
                    processes.once(partial(_diverged, run, every_rank, step, what))
                position.evaluation, position.evaluated = found, step
                tokens = step * config.batch_size * config.context
                training = {"step": step, "tokens": tokens, "seconds": round(meter.seconds, 3)}
                run.log("evaluation", **found.to_dict() | training)  # tokens are those trained on, as in every line
                spelled = found.bits_per_byte == found.bits_per_byte  # else nan
                bits = f", {found.bits_per_byte:.3f} bits per byte" if spelled else ""
                smooth = "" if found.averaged is None else f", {found.averaged:.4f} with averaged weights"
                quality = f"held-out loss {found.loss:.4f}{bits}{smooth}"
                report.note(f"step {step:,}: {quality}{_apart(found)}")
            if saves:
                position.seconds, position.skips, position.alarms = meter.seconds, guard.state(), alarms.state()
                processes.once(saver.wait)
                if snapshot := take(model, optimizer, asdict(position), processes, average):
                    saver.begin(partial(write, run.path, snapshot, tokenizer, config.keep))
            if signalled and step < config.steps:
                saver.wait()
                processes.wait()
                raise Interrupted(
                    f"stopped by {signal.Signals(signalled).name}; step {step:,} is saved in {run.path}. "
                    f"Go on with: moemamba train --run {shlex.quote(str(run.path))} --resume",
                    signalled,
                )
            meter.restart()
    processes.wait()  # nobody leaves before all is written
    report.note(f"step {position.step:,} is saved in {run.path}")
    return TrainResult(run.path, model.eval(), position.step, position.loss, position.evaluation)


def prepare_text(config: TrainConfig, report: Report) -> None:
    """Tokenise what a run reads, so that others find it in the cache; raises what `train` raises."""
    open_corpora(config.reads(), find_tokenizer(config.reads()), report)


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _resumes(run: RunDirectory, asked: bool | Literal["auto"], processes: Processes) -> bool:
    """Whether to go on with the run, as the first process sees it: another machine may see its directory late."""
    again = processes.any(restarted())
    return processes.once(lambda: (run.exists if asked == "auto" else asked) or (again and run.exists))


def _evaluate(
    model: MoEMamba,
    corpora: Corpora,
    config: TrainConfig,
    dtype: torch.dtype,
    processes: Processes,
    drop_gap: bool = True,
) -> Evaluation:
    rows = config.batch_size // (config.accumulate * processes.size)
    return evaluate(
        model,
        corpora.validation,
        context=config.context,
        batch_size=rows,
        most=config.eval_tokens,
        reset_state=config.reset_state,
        dtype=dtype,
        drop_gap=drop_gap and any(experts.capacity_factor is not None for experts in config.model.routers),
        group=min(rows, config.batch_size // routing_groups(config, processes.size)),
        processes=processes,
    )


def _apart(found: Evaluation) -> str:
    return "".join(f"; {name} {loss:.4f}" for name, loss in (found.apart or {}).items())


@contextmanager
def _closing(report: Report, run: RunDirectory, saver: Saver) -> Iterator[None]:
    try:
        yield
    finally:
        report.end()
        saver.wait()
        if run.log.board:
            run.log.board.close()


def _skipped(run: RunDirectory, report: Report, batches: Batches, guard: Guard, processes: Processes) -> int:
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
        return processes.once(partial(_diverged, run, batches, last.step, f"{last}{row}"))
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


def _diverged(run: RunDirectory, batches: Batches, step: int, what: str) -> NoReturn:
    """Write down which batch the step read, and raise; the checkpoints are all older than it."""
    run.log("failure", step=step, **_identity(batches, step))
    raise Diverged(
        f"{what}; the windows it read are in {run.log.file}, and the checkpoints are from before; resume with "
        "--on-failure skip, or begin a new run with a lower learning_rate or clip, or a longer warmup"
    )


def _identity(batches: Batches, step: int) -> dict[str, Any]:
    """Which text the batch of a step was."""
    return {"windows": batches.chosen(step - 1).tolist(), "context": batches.context}


def _log_routers(run: RunDirectory, report: Report, alarms: Alarms, meter: Meter, step: int, skipped: int) -> None:
    line = meter.router_line(step, skipped)
    run.log("router", **line)
    raised = alarms.look(line["layers"], meter.steps - skipped)
    for alarm in raised:
        run.log("alarm", step=step, **alarm)
    for sentence in sentences(step, raised):
        report.warn(sentence)


def _introduce(
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
        report.note(f"{'processes':10}{processes.size}, {what}{spread}")
    at = f"from step {position.step:,} of " if position.step else ""
    report.note(f"{'run':10}{config.run}, {at}{config.steps:,} steps, {tokens:,} tokens")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
