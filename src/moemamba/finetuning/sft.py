"""Supervised fine-tuning: a model learns what it should have answered."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..checkpoint import find_model, load, saveable, write_model
from ..host.files import expanded, new_directory, read_text, replace, vacant
from ..host.progress import Report
from ..layers import roles
from ..layers.quantised import expect_full
from ..model import MoEMamba
from .config import FinetuneConfig
from .examples import Example, find_examples, read_examples
from .lora import attach, merge
from .packing import Rows, pack
from .replay import Replay
from .template import PLAIN, Template

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning came to."""

    out: Path
    steps: int
    examples: int
    before: float | None
    """loss of the held-out answers, in nats a token; None if none are held out"""
    after: float | None
    text: tuple[float, float] | None = None
    """loss of the held-out part of the text that was replayed, before and after; None if none was"""


def finetune(run: str | Path, out: str | Path, config: FinetuneConfig, report: Report | None = None) -> Finetuned:
    """Fine-tune a model and write it into a new folder, with the template that it now knows and what was measured.

    Raises:
        ValueError: the data or the template cannot be used.
        FileExistsError: there is something at `out`.
        ArithmeticError: the loss is not finite any more.
        OSError: it cannot be read or written.
    """
    report = report or Report()
    find_model(expanded(run))  # all that is quickly seen, before a model is loaded and hours are spent
    find_examples(config.data)
    place = vacant(out)
    model, tokenizer = load(run, config.device)
    expect_full(model)
    template = Template(find_template(expanded(run), config.template), tokenizer)
    examples = read_examples(config.data, template, config.answers_only, config.held_out, config.context)
    train, held = ([e for e in examples if e.held_out is kept] for kept in (False, True))
    counted = sum(int(e.learnt[1:].sum()) for e in train)
    report.note(f"{'data':10}{len(train):,} examples, {counted:,} tokens to learn, {len(held):,} held out")
    replay = Replay(expanded(run), tokenizer, config, report) if config.replayed else None
    before, known = answer_loss(model, held, config), replay and replay.loss(model)
    lines = list(_train(model, train, replay, config, report))
    if replay and not replay.count:
        report.note(f"{'replay':10}nothing was read: beside so few rows of examples the share is less than one row")
    after, knows = answer_loss(model, held, config), replay and replay.loss(model)
    with new_directory(place) as folder:
        write_model(folder, model.config, saveable(model), tokenizer)
        replace(folder / CHAT_TEMPLATE, template.source)
        replace(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        told = asdict(config) | {"run": str(run), "loss_before": before, "loss_after": after}
        told |= replay.told(known, knows) if replay and known and knows else {}
        replace(folder / "finetune.json", json.dumps(told, indent=2) + "\n")
    text = (known.loss, knows.loss) if known and knows else None
    return Finetuned(place, len(lines), len(train), before, after, text)


def find_template(run: Path, asked: str | None) -> str:
    """The Jinja source that writes conversations: that which is asked for, the model's, or a plain one."""
    if asked is not None:
        return read_text(expanded(asked))
    file = find_model(run) / CHAT_TEMPLATE
    return read_text(file) if file.is_file() else PLAIN


def answer_loss(model: MoEMamba, examples: Sequence[Example], config: FinetuneConfig) -> float | None:
    """Mean loss of what is to be learnt, in nats a token; None without examples."""
    total, count = 0.0, 0
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for rows in pack(examples, range(len(examples)), config.context, config.batch_size) if examples else ():
            rows = Rows(*(part.to(device) for part in rows))
            here = int((rows.targets != -100).sum())
            output = model(rows.tokens, None, rows.seq_idx, rows.targets)
            assert output.loss is not None
            total, count = total + output.loss.item() * here, count + here
    return total / count if count else None


def _train(
    model: MoEMamba, examples: Sequence[Example], replay: Replay | None, config: FinetuneConfig, report: Report
) -> Iterator[dict[str, Any]]:
    """Steps, each with what was measured in it."""
    device = next(model.parameters()).device
    draw = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        optimizer = _optimizer(model, config)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batches = list(_batches(examples, config, draw))
    report.begin("fine-tuning", len(batches))
    model.train()
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * _share(step, len(batches), config.warmup)
        rows = replay.beside(rows) if replay else rows
        loss, auxiliary = _gradients(model, Rows(*(part.to(device) for part in rows)))
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            raise ArithmeticError(f"the loss of step {step + 1} is not finite; choose a lower --learning-rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report.update(step + 1, f"step {step + 1:,} of {len(batches):,}, loss {loss:.4f}")
        yield {"kind": "finetune", "step": step + 1, "loss": loss, "auxiliary": auxiliary, "grad_norm": norm.item()}
    report.end()
    model.eval()
    if config.method == "lora":
        merge(model)


def _optimizer(model: MoEMamba, config: FinetuneConfig) -> torch.optim.Optimizer:
    if config.method == "lora":
        groups = [{"params": attach(model, config.rank), "weight_decay": config.weight_decay}]
    else:
        model.requires_grad_(True)
        role, parameters = roles(model), dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in parameters.items() if role[n].decays is decays], "weight_decay": weight}
            for decays, weight in ((True, config.weight_decay), (False, 0.0))
        ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.95))


def _gradients(model: MoEMamba, rows: Rows) -> tuple[float, float]:
    """Backward through one batch; the losses of language and routers."""
    reduced = torch.autocast("cuda", torch.bfloat16) if rows.tokens.is_cuda else nullcontext()
    with parametrize.cached(), reduced:
        output = model(rows.tokens, None, rows.seq_idx, rows.targets)
    assert output.loss is not None and output.auxiliary is not None
    (output.loss + output.auxiliary).backward()
    return output.loss.item(), output.auxiliary.item()


def _batches(examples: Sequence[Example], config: FinetuneConfig, draw: np.random.Generator) -> Iterator[Rows]:
    """Epochs, each in an order of its own; a part of one at the end if they are no whole number."""
    left = config.epochs
    while left > 0:
        order = draw.permutation(len(examples))[: max(1, round(min(1.0, left) * len(examples)))]
        yield from pack(examples, order.tolist(), config.context, config.batch_size)
        left -= 1


def _share(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate: up in a line, down in half a cosine to a tenth."""
    first = round(warmup * steps)
    if step < first:
        return (step + 1) / first
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))
