"""The training loop: batches, loss, gradients, update; evaluation and checkpoints on the way."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ..data.batches import Batches
from ..data.config import NO_TEST
from ..data.corpora import find_tokenizer, open_corpora
from ..distributed import Agreement, Processes, join, sharing, sources
from ..host.progress import Report
from ..host.stop import Interrupted, Stop
from ..model import MoEMamba
from .config import TrainConfig, absolute
from .evaluate import Evaluation
from .held_out import measured, tested_once
from .run import (
    Position,
    RunDirectory,
    Saver,
    admit,
    begin,
    check_given,
    diverged,
    fingerprint,
    go_on_longer,
    introduce,
    log_evaluation,
    log_routers,
    plant,
    read_carried,
    read_model,
    require_beginning,
    restore,
    skipped_steps,
    take,
    write,
)
from .spread import build, require_fit, rows_of, sequence_parallel
from .update import Average, Guard, Step, captures, learning_rate, optimizer_of
from .watch import Alarms, Meter, Watch, Watcher, open_board, peak_flops, require_board


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run: Path
    model: MoEMamba = field(repr=False)
    """in evaluation mode; of several processes, this one's part"""
    step: int
    loss: float | None
    """mean training loss of the last steps, in nats a token"""
    evaluation: Evaluation | None
    """the last one"""
    test: Evaluation | None = None
    """of the finished run, on `TrainConfig.test`; None where there is none, or where an earlier call made it, whose
    line of kind test in metrics.jsonl has it"""


def train(
    config: TrainConfig,
    resume: bool | Literal["auto"] = False,
    *,
    stop: int | None = None,
    report: Report | None = None,
    model: MoEMamba | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Train a model in a run directory; with the processes that `torchrun` started, if it did.

    Args:
        resume: continue the run in `config.run` from its newest checkpoint, exactly as if it had never stopped;
            "auto": continue it if it has begun, and begin it otherwise. With more `config.steps` than before it goes on
            longer, its schedule stretched to them.
        stop: save and return after this step; a later call resumes.
        report: where progress is shown; standard output if None, nowhere with `Report(silent=True)`.
        model: of your own, with the weights that it has and whatever was changed in it, in place of one that is built;
            `config.model` becomes its configuration. It is trained in place. Who resumes the run hands in one of the
            same parts; if all are moemamba's own, nobody need.
        watch: called with a `Moment` for each line of metrics.jsonl; if it returns True, the run is saved at that step
            and `train` returns. Of several processes all call it.
    Raises:
        ValueError: data, configuration or model that cannot work, or a resumed run of which one differs.
        Diverged: the loss, its gradient or an evaluation is not finite, or the gradient spiked, as `config` has it.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP came; the step was finished and saved. A second signal ends
            at once.
        OSError: the run directory holds a run already, another process trains in it, or it cannot be written.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a TrainConfig(model=..., data=..., run=...)")
    if model is not None:
        check_given(model)
        config = replace(config, model=model.config)
    config = absolute(config)
    if not config.run:
        raise ValueError('run names no directory; say where the run shall lie: run="runs/mine"')
    with (
        _undisturbed(),
        join(config.device, config.timeout) as processes,
        closing(RunDirectory(config.run)) as run,
    ):
        return _train(run, config, resume, stop, report or Report(), processes, model, watch)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing that the caller has set for calculations of its own enters a run: gradients flow, and autocast is only
    where the run has it."""
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}, and weights are trained in float32; "
            "torch.set_default_dtype(torch.float32) before training"
        )
    on_gpu = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), on_gpu:
        yield


def _train(
    run: RunDirectory,
    config: TrainConfig,
    resume: bool | Literal["auto"],
    stop: int | None,
    report: Report,
    processes: Processes,
    given: MoEMamba | None,
    watch: Watch | None,
) -> TrainResult:
    report = report if processes.first else Report(silent=True)
    run.log.writes = processes.first
    require_board(config)
    captures(config, processes)  # raises before any work
    require_fit(config, processes)
    resume = _resumes(run, resume, processes)
    if processes.size > 1:
        processes.alike((torch.__version__, sources()), "versions of PyTorch or sources of moemamba")
    begun, config, tokenizer = processes.once(lambda: admit(run, config, resume, processes.size, given))
    if processes.first and not run.lock.holds:
        report.warn(f"{run.path} cannot be locked on this file system; see that no other process trains in it")
    text = config.reads()
    corpora = processes.first_of_machine_first(lambda: open_corpora(text, tokenizer, report))
    processes.alike(corpora.content, "training tokens")
    parts = config.accumulate
    rows = corpora.rows(text)
    every_rank = Batches(rows, config.batch_size)
    sequence = sharing(processes, sequence_parallel(config, processes.size))
    share = (sequence.rank, sequence.size) if sequence else (0, 1)
    reader, readers = (number // share[1] for number in (processes.rank, processes.size))
    batches = Batches(rows, rows_of(config, processes.size), reader, readers, *share)
    dtype = _dtype(config, processes.device)
    if given is not None and processes.size > 1:
        processes.alike(fingerprint(given), "weights of the models that are handed in")
    model = build(config, processes, dtype, given)
    watcher = run.log.watcher = None if watch is None else Watcher(watch, model)
    optimizer = optimizer_of(model, config)
    average = Average(model, config.average) if config.average else None
    if not resume:
        processes.once(lambda: begin(run, config, tokenizer, corpora.content, given))
        held_out = sum(text.tokens.bytes for text in corpora.validation)
        run.log("data", step=0, train_tokens=corpora.train_tokens, held_out_bytes=held_out)
    if config.branch:
        processes.once(lambda: plant(run, Path(str(config.branch))))
    position = Position(content=corpora.content)
    if resume or config.branch:
        position = restore(run, model, optimizer, corpora.content, report.note, processes, config.steps, average)
    if resume and not position.step:
        processes.once(lambda: require_beginning(run, given))
    if config.start and not position.step:
        read_model(Path(config.start), model)
        if average:
            average.begin()
    position, said = processes.once(lambda: (position, go_on_longer(run, config, position, begun)))
    introduce(report, config, corpora, processes, dtype, position)
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
    update = Step(model, optimizer, config, dtype, guard, processes, report.warn, agreement, average, sequence)
    if update.carried and position.step:
        update.carried.go_on(read_carried(run, position, config.batch_size), parts, processes.device)
    alarms = Alarms([experts.top_k for experts in config.model.routers], position.alarms)
    if processes.first:
        run.log.board = open_board(config, run.path, position.step)
    saver = Saver()
    model.train()
    report.begin("training", config.steps, position.step)
    begins = position.step
    with signals, _closing(report, run, saver):
        for step in range(position.step + 1, last + 1):
            rate = learning_rate(config, step - 1, position.warmup)
            batch = [batches[(step - 1) * parts + part] for part in range(parts)]
            meter.add(*update(step, batch, rate))
            position.step = step
            signalled = agreement.number()
            saves = step == last or step % config.save_every == 0 or signalled > 0 or step in config.save_at
            evaluates = step == config.steps or step % config.eval_every == 0
            if not (saves or evaluates or step % config.log_every == 0):
                continue
            skipped = skipped_steps(run, report, every_rank, guard, processes)
            if skipped < meter.steps:
                line = meter.train_line(step, rate, skipped)
                position.loss = line["loss"]
                run.log("train", **line)
                if meter.names:
                    log_routers(run, report, alarms, meter, step, skipped)
                speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                report.update(step, f"step {step:,} of {config.steps:,}: loss {line['loss']:.3f}, {speed}")
            if lost := report.lost():
                run.log("note", step=step, text=f"progress is no longer shown ({lost}); the run goes on")
            if evaluates:
                texts, most = corpora.validation, config.eval_tokens
                found = measured(model, average, texts, config, dtype, processes, sequence, most)
                if not math.isfinite(found.loss):
                    what = f"the held-out loss is not finite after step {step:,}"
                    processes.once(partial(diverged, run, every_rank, step, what))
                position.evaluation, position.evaluated = found, step
                log_evaluation(run, report, config, step, found, meter.seconds)
            ended = watcher is not None and processes.any(watcher.asked)
            if saves or ended:
                position.seconds, position.skips, position.alarms = meter.seconds, guard.state(), alarms.state()
                processes.once(saver.wait)
                if snapshot := take(model, optimizer, asdict(position), processes, average):
                    carried = update.carried.state() if update.carried else None
                    saver.begin(partial(write, run.path, snapshot, tokenizer, config.keep, config.save_at, carried))
            if signalled and step < config.steps:
                saver.wait()
                processes.wait()
                name = signal.Signals(signalled).name
                what = f"stopped by {name}; step {step:,} is saved in {run.path}. Go on with resume=True"
                raise Interrupted(what, signalled)
            if ended:
                break
            meter.restart()
        tested = None
        if position.step == config.steps and config.test != NO_TEST:
            tested = tested_once(run, report, model, average, corpora.test, config, dtype, processes, sequence)
    processes.wait()  # nobody leaves before all is written
    done = begins == config.steps
    end = "; nothing was left to do, and more steps go on with it" if done else ""
    report.note(f"step {position.step:,} is saved in {run.path}{end}")
    return TrainResult(run.path, model.eval(), position.step, position.loss, position.evaluation, tested)


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


@contextmanager
def _closing(report: Report, run: RunDirectory, saver: Saver) -> Iterator[None]:
    try:
        yield
    finally:
        report.end()
        saver.wait()
        if run.log.board:
            run.log.board.close()


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
