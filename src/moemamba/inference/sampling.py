"""From logits to tokens."""

import torch
from torch import Tensor

from .config import Sampling


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token a row.

    Args:
        logits: (b, v).
        generator: source of randomness on the logits' device; torch's own if None.
    Returns:
        (b,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # probability of all that is more likely
        scaled = scaled.masked_fill((before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf)
    if sampling.min_p is not None:
        probabilities = scaled.softmax(dim=-1)
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(probabilities < floor, -torch.inf)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]
