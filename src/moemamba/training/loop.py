"""The training loop: batches, loss, gradients, update; evaluation and checkpoints on the way."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..checkpoint import find_device
from ..counting import count_parameters
from ..model import MoEMamba
from ..tokenizer import Tokenizer, load_tokenizer, train_bpe
from .alarms import Alarms, sentences
from .config import TrainConfig
from .data import Batch, Batches, require_window
from .documents import Documents, held_out
from .evaluate import Evaluation, autocast, evaluate
from .guard import Diverged, Failed, Fatal, Guard, apply
from .loss import losses
from .metrics import Measures, Meter, add, measures, router_stats
from .optim import make_optimizer
from .peak import peak_flops
from .preparation import HELD_OUT, Corpus, cache_directory, prepare
from .progress import Report
from .run import Position, Run
from .schedule import learning_rate
from .stop import Interrupted, Stop
from .tensorboard import TensorBoard

BPE_TEXT = 1 << 26  # characters that a tokenizer is trained on at most


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run: Path
    model: MoEMamba
    """in evaluation mode"""
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
    """Train a model in a run directory.

    Args:
        resume: continue the run in `config.run` from its newest checkpoint, exactly as if it had never stopped;
            "auto": continue it if it has begun, and begin it otherwise.
        stop: save and return after this step; a later call resumes.
        report: where progress is shown; standard output if None.
    Raises:
        ValueError: data or configuration that cannot work, or a resumed run whose configuration or data differ.
        Diverged: the loss, its gradient or an evaluation is not finite, or the gradient spiked, as `config` has it.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the step was finished and saved. A second signal ends at once.
        OSError: the run directory holds a run already, or cannot be written.
    """
    report = report or Report()
    run = Run(config.run)
    resume = run.exists if resume == "auto" else resume
    run.claim(resume)
    device = find_device(config.device)
    dtype = _dtype(config, device)
    tokenizer = run.tokenizer() if resume else _tokenizer(config)
    config = dataclasses.replace(config, model=config.model.replace(vocab_size=tokenizer.vocab_size))
    if resume:
        run.check_unchanged(config)
    corpus = _corpus(config, tokenizer, report)
    batches = Batches(corpus.train, config.batch_size, config.context, config.data_seed, reset_state=config.reset_state)
    require_window("the held-out data (a share of `data`, or `validation`)", corpus.validation, config.context)
    torch.manual_seed(config.seed)
    model = MoEMamba(config.model).to(device)
    model.recompute = config.recompute
    optimizer = make_optimizer(model, config)
    if resume:
        position = run.restore(model, optimizer, corpus.content, report.note)
    else:
        position = Position(content=corpus.content)
        run.begin(config, tokenizer)
    _introduce(report, config, corpus, device, dtype, position)

    call: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    last = config.steps if stop is None else min(stop, config.steps)
    meter = Meter(config, model.router_names, position.seconds, peak_flops(device, dtype))
    guard = Guard(config, device, position.skips)
    alarms = Alarms([experts.top_k for experts in config.model.routers], position.alarms)
    if config.tensorboard:
        run.board = TensorBoard(run.path / "tensorboard", position.step)
    model.train()
    report.begin("training", config.steps, position.step)
    with Stop() as signals, _closing(report, run):
        for step in range(position.step + 1, last + 1):
            rate = learning_rate(config, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = batches[step - 1].to(device)
            meter.add(*_update(call, model, optimizer, batch, config, dtype, guard, step))
            position.step = step
            signalled = signals.number  # several processes must agree on it
            saves = step == last or step % config.save_every == 0 or signalled > 0
            evaluates = step == config.steps or step % config.eval_every == 0
            if not (saves or evaluates or step % config.log_every == 0):
                continue
            skipped = _skipped(run, report, batches, guard)
            if skipped < meter.steps:
                line = meter.train_line(step, rate, skipped)
                position.loss = line["loss"]
                run.log("train", **line)
                if meter.names:
                    _log_routers(run, report, alarms, meter, step, skipped)
                speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                report.update(step, f"step {step:,} of {config.steps:,}: loss {line['loss']:.3f}, {speed}")
            if evaluates:
                found = _evaluate(model, corpus, config, dtype)
                if not math.isfinite(found.loss):
                    raise _diverged(run, batches, step, f"the held-out loss is not finite after step {step:,}")
                position.evaluation, position.evaluated = found, step
                tokens = step * config.batch_size * config.context
                training = {"step": step, "tokens": tokens, "seconds": round(meter.seconds, 3)}
                run.log("evaluation", **asdict(found) | training)  # tokens are those trained on, as in every line
                report.note(f"step {step:,}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.3f} bits per byte")
            if saves:
                position.seconds, position.skips, position.alarms = meter.seconds, guard.state(), alarms.state()
                run.save(model, optimizer, tokenizer, position, config.keep)
            if signalled and step < config.steps:
                raise Interrupted(
                    f"stopped by {signals.name}; step {step:,} is saved in {run.path}. "
                    f"Go on with: moemamba train --run {run.path} --resume",
                    signalled,
                )
            meter.restart()
    report.note(f"step {position.step:,} is saved in {run.path}")
    return TrainResult(run.path, model.eval(), position.step, position.loss, position.evaluation)


def _update(
    call: nn.Module,
    model: MoEMamba,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    dtype: torch.dtype,
    guard: Guard,
    step: int,
) -> tuple[Measures, Tensor, Tensor]:
    """One optimiser step, withheld if it fails: the batch's measures, the gradient's norm before clipping, and that."""
    total: Measures = []
    for part in batch.split(config.accumulate):
        with autocast(batch.tokens.device, dtype):
            output = call(part.tokens, seq_idx=part.seq_idx, targets=part.targets)
        language, auxiliary = losses(output, model.config.routers)
        # Parts are of one size, so the mean of their means is that of the batch.
        ((language + auxiliary) / config.accumulate).backward()
        total = add(total, measures(language, auxiliary, output.router))
    total = list(torch._foreach_div(total, config.accumulate))
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    failed = guard.check(step, total[0] + total[1], norm)
    apply(optimizer, failed)
    optimizer.zero_grad()
    # A load of 0 everywhere leaves the biases where they are.
    model.update_balance_bias(router_stats(list(torch._foreach_mul(total, (~failed).to(total[0].dtype)))))
    return total, norm, failed


def _evaluate(model: MoEMamba, corpus: Corpus, config: TrainConfig, dtype: torch.dtype) -> Evaluation:
    return evaluate(
        model,
        corpus.validation,
        context=config.context,
        batch_size=config.batch_size // config.accumulate,
        most=config.eval_tokens,
        reset_state=config.reset_state,
        dtype=dtype,
        drop_gap=any(experts.capacity_factor is not None for experts in config.model.routers),
    )


@contextmanager
def _closing(report: Report, run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        report.end()
        if run.board:
            run.board.close()


def _skipped(run: Run, report: Report, batches: Batches, guard: Guard) -> int:
    """Read and write down which steps failed since the last line; returns how many.

    Raises:
        Diverged: one of them stops the run.
    """
    try:
        failed = guard.read()
    except Fatal as fatal:
        *failed, last = fatal.failed
        _log_skips(run, batches, failed)
        row = f", the {guard.in_a_row}th failure in a row" if guard.in_a_row > 1 else ""
        raise _diverged(run, batches, last.step, f"{last}{row}") from None
    _log_skips(run, batches, failed)
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        report.note(f"skipped: {failed[0]}{more}; {guard.in_all:,} skipped in all")
    return len(failed)


def _log_skips(run: Run, batches: Batches, failed: Sequence[Failed]) -> None:
    for skip in failed:
        figures = {"loss": skip.loss, "grad_norm": skip.grad_norm}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        run.log("skip", step=skip.step, **finite, **_identity(batches, skip.step))


def _diverged(run: Run, batches: Batches, step: int, what: str) -> Diverged:
    """Write down which batch the step read; the checkpoints are all older than it."""
    run.log("failure", step=step, **_identity(batches, step))
    return Diverged(
        f"{what}; the windows it read are in {run.metrics}, and the checkpoints are from before; resume with "
        "--on-failure skip, or begin a new run with a lower learning_rate or clip, or a longer warmup"
    )


def _identity(batches: Batches, step: int) -> dict[str, Any]:
    """Which text the batch of a step was."""
    return {"windows": batches.chosen(step - 1).tolist(), "context": batches.context}


def _log_routers(run: Run, report: Report, alarms: Alarms, meter: Meter, step: int, skipped: int) -> None:
    line = meter.router_line(step, skipped)
    run.log("router", **line)
    raised = alarms.look(line["layers"], meter.steps - skipped)
    for alarm in raised:
        run.log("alarm", step=step, **alarm)
    for sentence in sentences(step, raised):
        report.warn(sentence)


def _tokenizer(config: TrainConfig) -> Tokenizer:
    if trained := re.fullmatch(r"bpe-(\d+)", config.tokenizer):
        return train_bpe(_training_text(config), int(trained[1]))
    return load_tokenizer(config.tokenizer)


def _training_text(config: TrainConfig) -> Iterator[str]:
    """Documents to train a tokenizer on, those that will be held out left out."""
    left = BPE_TEXT
    for text in Documents(config.data):
        if config.validation is not None or not held_out(text.encode(), HELD_OUT):
            yield text
            left -= len(text)
        if left <= 0:
            return


def _corpus(config: TrainConfig, tokenizer: Tokenizer, report: Report) -> Corpus:
    started = False

    def show(done: int, total: int) -> None:
        nonlocal started
        if not started:
            report.begin("tokenising", total)
            started = True
        report.update(done, f"{done / 1e6:,.1f} MB tokenised")

    try:
        corpus = prepare(config.data, tokenizer, cache_directory(Path(config.run) / "tokens"), config.validation, show)
    finally:
        report.end()
    return corpus


def _introduce(
    report: Report, config: TrainConfig, corpus: Corpus, device: torch.device, dtype: torch.dtype, position: Position
) -> None:
    """The lines that begin a run's output."""
    count = count_parameters(config.model)
    for name, tokens in (("data", corpus.train), ("held out", corpus.validation)):
        report.note(
            f"{name:10}{len(tokens.ends):,} documents, {len(tokens.ids):,} tokens, {tokens.bytes / 1e6:,.1f} MB of "
            f"{corpus.name}"
        )
    if corpus.skipped:
        report.note(f"{'':10}{corpus.skipped:,} files skipped, which are not UTF-8 text")
    report.note(
        f"{'model':10}{config.model.pattern} x {config.model.n_blocks}, {count.total:,} parameters, {count.active:,} "
        f"active, and {count.embedding:,} for a vocabulary of {config.model.vocab_size:,}"
    )
    backend = ops.choose("selective_scan", torch.empty(0, device=device))
    report.note(f"{'device':10}{device}, {str(dtype).removeprefix('torch.')}, {backend} kernels")
    tokens_in_all = config.steps * config.batch_size * config.context
    at = f"from step {position.step:,} of " if position.step else ""
    report.note(f"{'run':10}{config.run}, {at}{config.steps:,} steps, {tokens_in_all:,} tokens")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
