"""The learning rate of every step. No torch here."""

import math

from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int, warmup: int | None = None) -> float:
    """Of the update that ends step `step` (0 is the first): a linear warm-up, then what `config.schedule` says.

    cosine: half a cosine down to the final rate (arXiv 1608.03983), as in the paper. linear: a straight line there.
    wsd: constant, and over the last `cooldown` of the steps a fall with the square root of what is done of it, to the
    final rate ("1-sqrt", arXiv 2405.18392, section 3).

    Args:
        warmup: steps of the warm-up where they are no share of these steps: a run that goes on longer keeps them.
    """
    warmup = warmup_steps(config) if warmup is None else warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    begin = fall(config, warmup)
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


def warmup_steps(config: TrainConfig) -> int:
    """Steps of the warm-up of a run that begins with this configuration."""
    return round(config.warmup * config.steps)


def fall(config: TrainConfig, warmup: int) -> int:
    """The last step (0 is the first) that has the full rate."""
    if config.schedule != "wsd":
        return warmup
    return max(warmup, config.steps - round(config.cooldown * config.steps) - 1)


def becomes(before: TrainConfig, now: TrainConfig, step: int, warmup: int) -> str:
    """What becomes of the schedule of a run that goes on after `step` steps with other steps in all; one sentence."""
    old, new = (learning_rate(config, step, warmup) for config in (before, now))
    match now.schedule:
        case "cosine":
            what = "the cosine is stretched anew over all of them"
        case "linear":
            what = "the line is drawn anew over all of them"
        case "wsd" if fall(now, warmup) >= step:
            what = f"the rate stays level until step {fall(now, warmup) + 1:,} and then cools down"
        case "wsd":
            what = "the rate cools down from here on"
    return (
        f"{now.steps:,} steps in all, {before.steps:,} before: {what}; the rate of step {step + 1:,} is {new:.3g}, "
        f"{old:.3g} before"
    )
