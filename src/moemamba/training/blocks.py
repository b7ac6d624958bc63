"""The standard error of a mean over a text, from the spread over parts of it. No torch here."""

import math
from collections.abc import Sequence


def standard_error(blocks: Sequence[tuple[float, float]]) -> float | None:
    """Of a mean of blocks, each (weight, value), whose weights sum to 1 and hardly differ; None of fewer than two.

    Blocks are of consecutive windows: neighbours are of one document and alike, so that single windows would seem to
    say more than they do.
    """
    if len(blocks) < 2:
        return None
    mean = sum(weight * value for weight, value in blocks)
    spread = sum((weight * (value - mean)) ** 2 for weight, value in blocks)
    return math.sqrt(spread * len(blocks) / (len(blocks) - 1))
