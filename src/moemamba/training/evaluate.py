"""How well a model predicts a text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import LOST, Batch, HeldOut, Tokens, predicted_bytes, sequential
from ..distributed import Processes
from ..layers import Router
from ..model import MoEMamba

LOGITS = 2**27  # held at once while predictions are counted


@dataclass(frozen=True)
class Evaluation:
    """Mean quality of predictions over a text."""

    loss: float
    """cross-entropy in nats a token"""
    perplexity: float = field(metadata={"finite": False})
    """exp(loss), infinite from a loss of 700 on"""
    bits_per_byte: float = field(default=math.nan, metadata={"finite": False})
    """of the UTF-8 text whose tokens were predicted, comparable between tokenizers; nan where the tokens do not spell
    more than a hundredth of it (`LOST`)"""
    tokens: int = 0
    """that were predicted"""
    accuracy: float = field(default=math.nan, metadata={"finite": False})
    """share of the tokens that the model held likeliest; nan in checkpoints of versions that did not count them"""
    drop_gap: float | None = field(default=None, metadata={"finite": False})
    """loss with the experts' capacity as in training, minus `loss`; None if not asked for"""
    apart: dict[str, float] | None = None
    """of several texts, the loss of each"""
    averaged: float | None = field(default=None, metadata={"finite": False})
    """loss of the averaged weights of a run that has some (`TrainConfig.average`)"""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, which has no nan: a figure that is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value == value}


def evaluate(
    model: MoEMamba,
    data: Tokens | Sequence[HeldOut],
    *,
    context: int = 256,
    batch_size: int = 16,
    most: int | None = None,
    reset_state: bool = False,
    dtype: torch.dtype = torch.float32,
    drop_gap: bool = False,
    group: int | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Predict the tokens of a text, in its own order, in windows that begin from an empty state.

    Every token is predicted but the first, which nothing comes before; the last window may be shorter. No token is
    dropped for want of capacity, so the result does not depend on batch_size.

    Args:
        data: see `preparation.prepare`; of several texts, each has its share of `most` and of every mean.
        context: tokens in a window.
        batch_size: windows computed at once.
        most: read about that many tokens at most; all if None.
        reset_state: begin every document from an empty state too.
        dtype: of the activations (torch.float32 or torch.bfloat16).
        drop_gap: measure too what the capacity limits of training would cost.
        group: windows that are routed together for the drop gap, which depends on it; batch_size if None.
        processes: that share the work, each with the same model; every one returns the whole result.
    Raises:
        ValueError: the text does not fill one window, or has tokens that the model does not.
    """
    processes = processes or Processes(next(model.parameters()).device)
    rows = min(batch_size, max(1, LOGITS // (context * model.config.vocab_size)))
    texts = [HeldOut("", 1.0, data)] if isinstance(data, Tokens) else data
    apart: dict[str, float] = {}
    loss = accuracy = limited = token_bytes = 0.0
    tokens = 0
    for name, share, text in texts:
        own = None if most is None else round(most * share)

        def batches(rows: int, name: str = name, text: Tokens = text, own: int | None = own) -> Iterator[Batch]:
            found = _within(sequential(text, rows, context, own, reset_state), model.config.vocab_size, name)
            return _dealt(found, processes)

        apart[name], right, count = _means(model, False, batches(rows), dtype, processes)
        loss, accuracy, tokens = loss + share * apart[name], accuracy + share * right, tokens + count
        token_bytes += share * predicted_bytes(text, context, own) / count
        if drop_gap:
            limited += share * _means(model, True, batches(group or batch_size), dtype, processes)[0]
    spelled = token_bytes > 0 and not any(text.lost > LOST for _, _, text in texts)
    return Evaluation(
        loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / token_bytes / math.log(2) if spelled else math.nan,
        tokens=tokens,
        accuracy=accuracy,
        drop_gap=limited - loss if drop_gap else None,
        apart=apart if len(texts) > 1 else None,
    )


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Activations in `dtype` over float32 weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _means(
    model: MoEMamba, capacity: bool, batches: Iterator[Batch], dtype: torch.dtype, processes: Processes
) -> tuple[float, float, int]:
    """Loss in nats a token, share of tokens predicted right, number of tokens; with `capacity` a batch is one group."""
    was_training = model.training
    model.train(capacity)
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, right, tokens
    try:
        with one_group(model):
            for batch in batches:
                batch = batch.to(processes.device)
                with autocast(processes.device, dtype):
                    sums += _sums(model, batch, capacity)
    finally:
        model.train(was_training)
    total, right, tokens = processes.sum([sums])[0].tolist()
    return total / tokens, right / tokens, int(tokens)


def _sums(model: MoEMamba, batch: Batch, capacity: bool) -> Tensor:
    """(3,) float64: loss and right predictions, summed, and how many positions count."""
    counted = batch.targets != -100
    if capacity:  # only the loss is asked for, and a routing group cannot be cut to spare memory
        mean = model(batch.tokens, seq_idx=batch.seq_idx, targets=batch.targets).loss
        return torch.stack([mean.double() * counted.sum(), torch.zeros_like(mean).double(), counted.sum().double()])
    logits = model(batch.tokens, seq_idx=batch.seq_idx).logits.flatten(0, 1).float()
    targets = batch.targets.flatten()  # -100, which is no token, neither counts nor is ever right
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return torch.stack([loss.double(), (logits.argmax(-1) == targets).sum().double(), counted.sum().double()])


def _within(batches: Iterable[Batch], vocab_size: int, name: str) -> Iterator[Batch]:
    """The batches; raises ValueError at a token that the model does not have."""
    for batch in batches:
        largest = max(int(batch.tokens.max()), int(batch.targets.max()))
        if largest >= vocab_size:
            raise ValueError(
                f"{name or 'the text'} holds the token {largest}, but the model has {vocab_size}; tokenise it with the "
                "model's own tokenizer"
            )
        yield batch


def _dealt(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """Every process's share; as many for each, since sharded layers need all: where one has no more, padding."""
    last = None
    for number, batch in enumerate(batches):
        if number % processes.size == processes.rank:
            yield batch
        last = (number, batch)
    if last is not None and processes.rank > last[0] % processes.size:
        tokens, targets, _ = last[1]
        yield Batch(tokens, torch.full_like(targets, -100), torch.full_like(tokens, -1, dtype=torch.int32))


@contextmanager
def one_group(model: MoEMamba) -> Iterator[None]:
    """Let routers take each batch of this process as one routing group."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    before = [(router.groups, router.across) for router in routers]
    for router in routers:
        router.groups, router.across = 1, None
    try:
        yield
    finally:
        for router, (groups, across) in zip(routers, before, strict=True):
            router.groups, router.across = groups, across
