"""From logits to tokens."""

import torch
from torch import Tensor

from .config import Sampling

TINY = torch.finfo(torch.float32).tiny


def sample(logits: Tensor, sampling: Sampling, draws: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    Args:
        logits: (b, v).
        draws: (b, v) float32, exponential variables of `Draws`; from torch's own generator if None.
    Returns:
        (b,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Relative to the largest, and at a temperature that float32 holds, nothing becomes infinite that was not.
    temperature = min(max(sampling.temperature, TINY), 1 / TINY)
    scaled = logits.float()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        most, places = scaled.topk(sampling.top_k, dim=-1)  # k of them, of equals too
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, places, most)
    if sampling.top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # probability of all that is more likely
        scaled = scaled.masked_fill((before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf)
    if sampling.min_p is not None:
        probabilities = scaled.softmax(dim=-1)
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scaled = scaled.masked_fill(probabilities < floor, -torch.inf)
    # Of exponential variables with these rates the first to come: as torch.multinomial, which also asks whether all is
    # well, and whose randomness is that of the whole batch.
    times = torch.empty_like(scaled).exponential_() if draws is None else draws
    return scaled.softmax(dim=-1).div_(times).argmax(dim=-1)
