"""How well a model predicts a text."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ..model import MoEMamba
from .data import Tokens, sequential

ROWS = 2048  # positions whose logits are held at once


@dataclass(frozen=True)
class Evaluation:
    """Mean quality of predictions over a text."""

    loss: float
    """cross-entropy in nats a token"""
    perplexity: float
    """exp(loss)"""
    bits_per_byte: float
    """of the UTF-8 text, comparable between tokenizers"""
    tokens: int
    """that were predicted"""
    accuracy: float = math.nan
    """share of the tokens that the model held likeliest; nan in checkpoints of versions that did not count them"""
    drop_gap: float | None = None
    """loss with the experts' capacity as in training, minus `loss`; None if not asked for"""


def evaluate(
    model: MoEMamba,
    data: Tokens,
    *,
    context: int = 256,
    batch_size: int = 16,
    most: int | None = None,
    reset_state: bool = False,
    dtype: torch.dtype = torch.float32,
    drop_gap: bool = False,
) -> Evaluation:
    """Predict every token of a text, in its own order, in windows that begin from an empty state.

    No token is dropped for want of capacity, so the result does not depend on batch_size.

    Args:
        data: see `preparation.prepare`.
        context: tokens in a window.
        batch_size: windows computed at once.
        most: read about that many tokens at most; all if None.
        reset_state: begin every document from an empty state too.
        dtype: of the activations (torch.float32 or torch.bfloat16).
        drop_gap: measure too what the capacity limits of training would cost; this does depend on batch_size.
    Raises:
        ValueError: the text does not fill one window.
    """
    arguments = (data, context, batch_size, most, reset_state, dtype)
    loss, accuracy, tokens = _means(model, False, *arguments)
    gap = _means(model, True, *arguments)[0] - loss if drop_gap else None
    per_byte = len(data.ids) / max(1, data.bytes)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, loss * per_byte / math.log(2), tokens, accuracy, gap)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Activations in `dtype` over float32 weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _means(
    model: MoEMamba,
    capacity: bool,
    data: Tokens,
    context: int,
    batch_size: int,
    most: int | None,
    reset_state: bool,
    dtype: torch.dtype,
) -> tuple[float, float, int]:
    """Loss in nats a token, share of tokens predicted right, and the number of tokens."""
    device = next(model.parameters()).device
    was_training = model.training
    model.train(capacity)
    total, right = torch.zeros(2, dtype=torch.float64, device=device)
    tokens = 0
    try:
        for batch in sequential(data, batch_size, context, most, reset_state):
            batch = batch.to(device)
            with autocast(device, dtype):
                hidden, _, _ = model.backbone(batch.tokens, seq_idx=batch.seq_idx)
                parts = hidden.flatten(0, 1).split(ROWS), batch.targets.flatten().split(ROWS)
                for part, targets in zip(*parts, strict=True):
                    logits = model.head(part).float()
                    total += nn.functional.cross_entropy(logits, targets, reduction="sum")
                    right += (logits.argmax(-1) == targets).sum()
            tokens += batch.tokens.numel()
    finally:
        model.train(was_training)
    return total.item() / tokens, right.item() / tokens, tokens
