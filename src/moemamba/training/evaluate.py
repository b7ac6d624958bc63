"""How well a model predicts a text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Tokens
from ..data.preparation import cache_directory, prepare
from ..data.prepared import Corpus, is_prepared
from ..data.windows import LOST, HeldOut, predicted_bytes, sequential, windows
from ..distributed import Processes, splitting
from ..layers import BaseRouter, routers
from ..layers.parts import Parts
from ..model import MoEMamba
from ..text import Tokenizer, load_tokenizer
from .blocks import standard_error

LOGITS = 2**27  # held at once while predictions are counted
BLOCKS = 64  # parts of a text whose losses are told apart, so that two models can be compared part by part


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
    standard_error: float | None = None
    """of the loss, from the spread over blocks of consecutive windows; None if not asked for, or of one block"""
    blocks: tuple[tuple[float, float], ...] | None = None
    """weight in the mean and loss of each block of consecutive windows; None if not asked for"""
    averaged: float | None = field(default=None, metadata={"finite": False})
    """loss of the averaged weights of a run that has some (`TrainConfig.average`)"""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, which has no nan: a figure that is not known is left out."""
        unasked = {name for name in ("standard_error", "blocks") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if value == value and name not in unasked}


def evaluate(
    model: MoEMamba,
    data: Tokens | Corpus | Sequence[HeldOut] | str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    context: int = 256,
    batch_size: int = 16,
    most: int | None = None,
    reset_state: bool = False,
    dtype: torch.dtype = torch.float32,
    drop_gap: bool = False,
    group: int | None = None,
    processes: Processes | None = None,
    blocks: int | None = None,
    sequence: Parts | None = None,
) -> Evaluation:
    """Predict the tokens of a text, in its own order, in windows that begin from an empty state.

    Every token is predicted but the first, which nothing comes before; the last window may be shorter. No token is
    dropped for want of capacity, so the result does not depend on batch_size.

    Args:
        data: tokens, as of `prepare`, of which the held-out ones count; a folder that `prepare` has written; a text, a
            file or a folder, with its tokenizer; or several texts, each of which has its share of `most` and of every
            mean.
        tokenizer: of a text.
        context: tokens in a window.
        batch_size: windows computed at once.
        most: read about that many tokens at most; all if None.
        reset_state: begin every document from an empty state too.
        dtype: of the activations (torch.float32 or torch.bfloat16).
        drop_gap: measure too what the capacity limits of training would cost.
        group: windows that are routed together for the drop gap, which depends on it; batch_size if None.
        processes: that share the work, each with the same model; every one returns the whole result.
        blocks: tell the losses of about so many parts of the text apart, and the standard error of their mean.
        sequence: those of the processes that share each window with this one, of which each computes its part.
    Raises:
        ValueError: the text does not fill one window, or has tokens that the model does not.
    """
    processes = processes or Processes(next(model.parameters()).device)
    own_context = -(-context // (sequence.size if sequence else 1))
    rows = min(batch_size, max(1, LOGITS // (own_context * model.config.vocab_size)))
    texts = _texts(data, tokenizer)
    apart: dict[str, float] = {}
    parts: list[tuple[float, float]] = []
    loss = accuracy = limited = token_bytes = 0.0
    tokens = 0
    for name, share, text, half in texts:
        own = None if most is None else round(most * share)
        starts, tail = windows(text, context, own, half)
        count = max(1, round((blocks or 1) * share))

        def batches(
            rows: int, name: str = name, text: Tokens = text, own: int | None = own, half: int | None = half
        ) -> Iterator[_Numbered]:
            found = _within(sequential(text, rows, context, own, reset_state, half), model.config.vocab_size, name)
            return _dealt(found, processes, sequence)

        total = len(starts) + (tail > 0)
        sums = _sums_of_blocks(model, False, batches(rows), total, count, dtype, processes, sequence)
        apart[name], right, counted = _mean(sums, 0), _mean(sums, 1), int(sum(block[2] for block in sums))
        loss, accuracy, tokens = loss + share * apart[name], accuracy + share * right, tokens + counted
        parts += [(share * block[2] / counted, block[0] / block[2]) for block in sums]
        token_bytes += share * predicted_bytes(text, context, own, half) / counted
        if drop_gap:
            group_batches = batches(group or batch_size)
            found = _sums_of_blocks(model, True, group_batches, total, 1, dtype, processes, sequence)
            limited += share * _mean(found, 0)
    spelled = token_bytes > 0 and not any(text.tokens.lost > LOST for text in texts)
    return Evaluation(
        loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / token_bytes / math.log(2) if spelled else math.nan,
        tokens=tokens,
        accuracy=accuracy,
        drop_gap=limited - loss if drop_gap else None,
        apart=apart if len(texts) > 1 else None,
        standard_error=standard_error(parts) if blocks else None,
        blocks=tuple(parts) if blocks else None,
    )


def _texts(data: Tokens | Corpus | Sequence[HeldOut] | str | Path, tokenizer: Tokenizer | None) -> Sequence[HeldOut]:
    if isinstance(data, str | Path):
        own = load_tokenizer(data) if tokenizer is None and is_prepared(data) else tokenizer
        if own is None:
            raise ValueError(f"{data} is text; give the model's tokenizer too: evaluate(model, data, tokenizer)")
        data = prepare(data, own, cache_directory(Path("tokens")), held_out=0.0)
    if isinstance(data, Corpus):
        data = data.validation if len(data.validation.ids) else data.train
    if isinstance(data, Tokens):
        return [HeldOut("", 1.0, data)]
    if all(isinstance(text, HeldOut) for text in data):
        return data
    raise ValueError("data is none that can be evaluated; give tokens, a folder that prepare has written, or a text")


def mixed_precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Activations in `dtype` over float32 weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


_Numbered = tuple[int, Batch]  # a batch, and the number of its first window in the pass


@torch.no_grad()
def _sums_of_blocks(
    model: MoEMamba,
    capacity: bool,
    batches: Iterator[_Numbered],
    total: int,
    blocks: int,
    dtype: torch.dtype,
    processes: Processes,
    sequence: Parts | None,
) -> list[list[float]]:
    """[loss, right, tokens] of each block that has some, summed; with `capacity` a batch is one group, and of the
    block of its first window.

    Args:
        total: windows of the pass, of which each block has as many as the next, or one less.
    """
    was_training = model.training
    model.train(capacity)
    sums = torch.zeros(blocks, 3, dtype=torch.float64, device=processes.device)
    try:
        with one_group(model), splitting(model, sequence):
            for first, batch in batches:
                batch = batch.to(processes.device)
                with mixed_precision(processes.device, dtype):
                    found = _sums(model, batch, capacity)
                for block, rows in _cut(first, len(found), total, blocks):
                    sums[block] += found[rows].sum(0)
    finally:
        model.train(was_training)
    return [block for block in processes.sum([sums])[0].tolist() if block[2]]


def _cut(first: int, rows: int, total: int, blocks: int) -> Iterator[tuple[int, slice]]:
    """The rows of a batch of windows by the block that they are of."""
    place = 0
    while place < rows:
        block = min(first + place, total - 1) * blocks // total
        end = min(rows, max(place + 1, -(-(block + 1) * total // blocks) - first))
        yield block, slice(place, end)
        place = end


def _mean(blocks: list[list[float]], figure: int) -> float:
    """A figure of all blocks by their tokens."""
    return sum(block[figure] for block in blocks) / sum(block[2] for block in blocks)


def _sums(model: MoEMamba, batch: Batch, capacity: bool) -> Tensor:
    """(b, 3) float64 of each row: loss and right predictions, summed, and how many positions count; (1, 3) of all rows
    with `capacity`."""
    counted = batch.targets != -100
    if capacity:  # only the loss is asked for, and a routing group cannot be cut to spare memory
        mean = model(batch.tokens, seq_idx=batch.seq_idx, targets=batch.targets).loss
        assert mean is not None
        return torch.stack([mean.double() * counted.sum(), torch.zeros_like(mean).double(), counted.sum().double()])[
            None
        ]
    found = model(batch.tokens, seq_idx=batch.seq_idx).logits
    assert found is not None
    logits = found.flatten(0, 1).float()
    targets = batch.targets.flatten()  # -100, which is no token, neither counts nor is ever right
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none").view_as(counted)
    right = (logits.argmax(-1) == targets).view_as(counted)
    return torch.stack([each.sum(1).double() for each in (loss, right, counted)], 1)


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


def _dealt(batches: Iterable[Batch], processes: Processes, sequence: Parts | None) -> Iterator[_Numbered]:
    """Every process's share; as many for each, since sharded layers need all: where one has no more, padding. Those
    that share their sequences have the same share, and parts of it that are equally long."""
    together = sequence.size if sequence else 1
    reader, readers = processes.rank // together, processes.size // together
    last, first = None, 0
    for number, batch in enumerate(batches):
        if number % readers == reader:
            yield first, _part(batch, sequence)
        first += len(batch.tokens)
        last = (number, batch)
    if last is not None and reader > last[0] % readers:
        tokens, targets = last[1][:2]
        padding = Batch(tokens, torch.full_like(targets, -100), torch.full_like(tokens, -1, dtype=torch.int32))
        yield 0, _part(padding, sequence)


def _part(batch: Batch, sequence: Parts | None) -> Batch:
    """This process's part of each row, of which the last is filled up with padding."""
    if sequence is None:
        return batch
    tokens, targets, seq_idx, _ = batch
    missing = -tokens.shape[1] % sequence.size
    if missing and seq_idx is None:
        seq_idx = torch.zeros_like(tokens, dtype=torch.int32)

    def own(rows: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(rows, (0, missing), value=fill).chunk(sequence.size, 1)[sequence.rank]

    return Batch(own(tokens, 0), own(targets, -100), None if seq_idx is None else own(seq_idx, -1))


@contextmanager
def one_group(model: MoEMamba) -> Iterator[None]:
    """Let routers take each batch of this process as one routing group."""
    found = [router for router in routers(model).values() if isinstance(router, BaseRouter)]
    before = [(router.groups, router.across) for router in found]
    for router in found:
        router.groups, router.across = 1, None
    try:
        yield
    finally:
        for router, (groups, across) in zip(found, before, strict=True):
            router.groups, router.across = groups, across
