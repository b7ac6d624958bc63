"""The learning rate of every step. No torch here."""

import math

from .config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that ends step `step` (0 is the first): a linear warm-up, then what `config.schedule` says.

    cosine: half a cosine down to the final rate (arXiv 1608.03983), as in the paper. linear: a straight line there.
    wsd: constant, and over the last `cooldown` of the steps a fall with the square root of what is done of it, to the
    final rate ("1-sqrt", arXiv 2405.18392, section 3).
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    begin = warmup
    if config.schedule == "wsd":
        begin = max(warmup, config.steps - round(config.cooldown * config.steps) - 1)
    # 0 where the fall begins, 1 at the last step.
    progress = min(1.0, max(0.0, (step - begin) / max(1, config.steps - 1 - begin)))
    match config.schedule:
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            left = 1 - progress
        case "wsd":
            left = 1 - math.sqrt(progress)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * left)
