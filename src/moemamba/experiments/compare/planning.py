"""The runs of a comparison: what each is trained with, and which branch off which."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...training.config import TrainConfig
from .contender import Contender


def planned(plan: Sequence[tuple[Contender, int]], base: TrainConfig, out: Path) -> list[TrainConfig]:
    """How each (contender, seed) is trained; those that others branch off save where they do.

    Raises:
        ValueError: a branch that cannot be.
    """
    configs = {(contender.name, seed): _config(contender, base, seed, out) for contender, seed in plan}
    for contender, seed in plan:
        if contender.trunk is not None:
            trunk = configs[contender.trunk, seed]
            step = _fork(contender.name, configs[contender.name, seed], trunk)
            configs[contender.trunk, seed] = dataclasses.replace(trunk, save_at=(*trunk.save_at, step))
            place = Path(trunk.run).resolve() / "checkpoints" / f"{step:08d}"
            configs[contender.name, seed] = dataclasses.replace(configs[contender.name, seed], branch=str(place))
    return [configs[contender.name, seed] for contender, seed in plan]


def leaves(config: TrainConfig) -> bool:
    """Whether the checkpoint that a run branches off is there; it is not where its trunk has diverged before.

    Raises:
        ValueError: its trunk is at its end and has not saved there, as if it was trained before anything branched off.
    """
    place = Path(str(config.branch))
    if not place.is_dir() and any(int(each.name) > int(place.name) for each in place.parent.glob("[0-9]*")):
        raise ValueError(
            f"{config.run} branches off {place}, which was not saved; remove {place.parent.parent}, so that it is "
            "trained again, or choose another --out"
        )
    return place.is_dir()


def _config(contender: Contender, base: TrainConfig, seed: int, out: Path) -> TrainConfig:
    own: dict[str, Any] = {
        "model": contender.model,
        "run": str(out / contender.name / f"seed-{seed}"),
        "seed": seed,
        "data_seed": seed,
    }
    return dataclasses.replace(base, **own, **contender.recipe)


def _fork(name: str, config: TrainConfig, trunk: TrainConfig) -> int:
    """The step after which a branch leaves its trunk: the last before its cool-down."""
    step, level = (each.steps - round(each.cooldown * each.steps) for each in (config, trunk))
    if trunk.schedule != "wsd":
        raise ValueError(f'{name} branches off a run with the schedule "{trunk.schedule}"; it needs --schedule wsd')
    if not round(trunk.warmup * trunk.steps) <= step <= level or step < 1 or config.steps >= trunk.steps:
        warm = round(trunk.warmup * trunk.steps)
        raise ValueError(
            f"{name} with {config.steps:,} steps would leave its trunk after step {step:,}; that must lie between the "
            f"end of the warm-up, {warm:,}, and the begin of the trunk's own cool-down, {level:,}"
        )
    return step
