"""Where a run begins other than at its seed's weights: with another's weights, or in the middle of another run."""

import json
import math
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint import AVERAGED, CheckpointError, checkpoints, newest_of
from ...config import ModelConfig
from ...data.corpora import find_tokenizer
from ...host import files
from ...host.files import expanded, new_directory
from ...letters import LETTERS
from ...model import MoEMamba
from ...reading import read_config
from ...text import Tokenizer, load_tokenizer
from ..config import TrainConfig
from ..spread import check, check_used, routing_groups
from ..update import becomes, fall, learning_rate, warmup_steps
from .directory import RunDirectory
from .given import check_resumed, note_given
from .position import Position, read_position


def admit(
    run: RunDirectory, config: TrainConfig, resume: bool, size: int, given: MoEMamba | None = None
) -> tuple[TrainConfig, TrainConfig, Tokenizer]:
    """Check what can be checked before any work.

    Returns:
        the configuration that the run (of a new branch the run that it leaves) had before, this one if none; the
        configuration with what the run settles; its tokenizer.
    """
    if given is not None and (config.start or config.branch):
        raise ValueError("a model that is handed in has its weights already; leave start and branch out")
    run.occupy(resume)
    if resume:
        check_resumed(run, given)
    config = settle(config, run.config() if resume else None)
    origin = run if resume else left_by(config.branch) if config.branch else None
    begun = origin.config() if origin else config
    if origin and config.routing_groups is None:
        config = replace(config, routing_groups=begun.routing_groups or begun.accumulate)
    check(config, size)
    if not resume:
        check_used(config, size)
    tokenizer = origin.tokenizer() if origin else find_tokenizer(config.reads())
    if given is None:
        model = config.model.replace(vocab_size=_vocabulary(config, begun if origin else None, tokenizer))
    elif (model := config.model).vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model knows {model.vocab_size:,} tokens, but the tokenizer has {tokenizer.vocab_size:,}; give the "
            "tokenizer that belongs to the model"
        )
    config = replace(config, model=model, routing_groups=routing_groups(config, size))
    if resume:
        run.check_unchanged(config)
    elif config.branch:
        check_branch(config)
    elif config.start:
        check_start(config, tokenizer)
    return begun, config, tokenizer


def _vocabulary(config: TrainConfig, begun: TrainConfig | None, tokenizer: Tokenizer) -> int:
    """Tokens that the model knows: those of the tokenizer, or more where the weights that it goes on with have more."""
    if begun:
        return max(begun.model.vocab_size, tokenizer.vocab_size)
    if config.start:
        own = read_config(ModelConfig, Path(config.start) / "config.json")
        return max(own.vocab_size, tokenizer.vocab_size)
    return tokenizer.vocab_size


def begin(
    run: RunDirectory, config: TrainConfig, tokenizer: Tokenizer, content: str, given: MoEMamba | None = None
) -> None:
    """Write what describes a new run; `content` is the hash of its training tokens, which a branch must share."""
    if config.branch:
        check_data(Path(config.branch), content)
    note_given(run, given)
    run.begin(config, tokenizer)


def find_checkpoint(place: str, option: str) -> Path:
    """The folder with a model, absolute: a checkpoint, a saved model, or the newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    folder = newest_of(expanded(place).resolve())
    if folder is None:
        raise CheckpointError(
            f"{option} is {place}, where there is no model; name a run that has saved, a checkpoint (runs/mine/"
            "checkpoints/00001000) or a folder that save has written"
        )
    return folder


def settle(config: TrainConfig, begun: TrainConfig | None) -> TrainConfig:
    """`start` and `branch` as the checkpoints that they mean, absolute; of a resumed run those that it began with.

    Raises:
        CheckpointError: there is no model.
        ValueError: the run began with others.
    """
    if begun is None:
        return replace(
            config,
            start=config.start and str(find_checkpoint(config.start, "start")),
            branch=config.branch and str(find_checkpoint(config.branch, "branch")),
        )
    for name, given, then in (("start", config.start, begun.start), ("branch", config.branch, begun.branch)):
        if given != then and not (given and then and _means(given, Path(then))):
            raise ValueError(
                f"{name} is {given!r}, but the run in {config.run} began with {then!r}; resume with that value, or "
                "begin a new run"
            )
    return replace(config, start=begun.start, branch=begun.branch)


def _means(given: str, checkpoint: Path) -> bool:
    """Whether a name is that of a checkpoint, or of the run that has, or had, it."""
    folder, own = expanded(given).resolve(), checkpoint
    if AVERAGED in (folder.name, checkpoint.name):
        if folder.name != checkpoint.name:
            return False
        folder, own = folder.parent, checkpoint.parent
    return folder == own or (own.parent.name == "checkpoints" and folder == own.parent.parent)


def check_start(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Whether a run can begin with the weights of `config.start`.

    Raises:
        ValueError: they are of another architecture or tokenizer, with what differs.
        CheckpointError: their description is damaged.
    """
    folder = Path(str(config.start))
    theirs, mine = read_config(ModelConfig, folder / "config.json"), config.model
    then, now = _function(theirs), _function(mine)
    if differing := [name for name in now if then.get(name) != now[name]]:
        what = ", ".join(f"{name} is {now[name]!r}, not {then.get(name)!r}" for name in differing[:3])
        more = f", and {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise ValueError(
            f"the model is not that of start = {folder}: {what}{more}; train that model, which is the default "
            "where no preset is named"
        )
    if what := _another(load_tokenizer(folder), tokenizer):
        raise ValueError(
            f"the tokenizer is not that of start = {folder}: {what}, so that its tokens mean nothing "
            f"to these weights; give tokenizer = {folder}"
        )


def _function(config: ModelConfig) -> dict[str, Any]:
    """The fields that a model's function depends on, by name, widths that follow from others filled in."""
    unused = {part for letter in LETTERS.values() for part in letter.parts} - set(config.parts)
    found = _flat(config)
    for letter in config.letters:
        found |= letter.widths(config)
    return {name: value for name, value in found.items() if name.split(".")[0] not in unused}


def _flat(options: Any, prefix: str = "") -> dict[str, Any]:
    """The fields that are not marked as free, those of parts as "experts.top_k"."""
    found: dict[str, Any] = {}
    for field in fields(options):
        if not field.metadata.get("free"):
            name, value = f"{prefix}{field.name}", getattr(options, field.name)
            found |= _flat(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def _another(theirs: Tokenizer, mine: Tokenizer) -> str:
    """In what two tokenizers differ; nothing if they are one."""
    if mine.vocab_size != theirs.vocab_size:
        return f"it has {mine.vocab_size:,} tokens, not {theirs.vocab_size:,}"
    now, then = json.loads(mine.to_json()), json.loads(theirs.to_json())
    if now == then:
        return ""
    if now["model"].get("vocab") != then["model"].get("vocab"):
        return f"it has as many tokens ({mine.vocab_size:,}), but others"
    differing = sorted(name for name in now | then if now.get(name) != then.get(name))
    return f"it splits text otherwise ({', '.join(differing)})"


def left_by(branch: str) -> RunDirectory:
    """The run that a branch leaves at a checkpoint.

    Raises:
        CheckpointError: the checkpoint lacks what training goes on from, or lies outside the directory of a run.
    """
    folder = Path(branch)
    origin = RunDirectory(folder.parent.parent)
    if not (folder / "training.json").exists() or not origin.exists:
        raise CheckpointError(
            f"branch is {folder}, which is not in the directory of a run, whose optimiser and train.json are needed; "
            "name a run or one of its checkpoints, or take the weights alone with start"
        )
    return origin


def check_branch(config: TrainConfig) -> None:
    """Whether a run can go on from the checkpoint of `config.branch` as that checkpoint's own run would.

    Raises:
        ValueError: it differs in more than the end of its schedule, or the rate would jump.
        CheckpointError: see `left_by`.
    """
    folder = Path(str(config.branch))
    origin = left_by(str(config.branch))
    origin.check_unchanged(config, "on a branch")
    position, before = read_position(folder), origin.config()
    before, step = replace(before, steps=position.planned or before.steps), position.step
    if config.steps <= step:
        raise ValueError(f"steps is {config.steps}, but {folder} has done {step:,}; give more")
    warmup = warmup_steps(before) if position.warmup is None else position.warmup
    rates = [learning_rate(each, step, warmup) for each in (before, config)]
    if config.schedule == "wsd" and fall(config, warmup) < step - 1 and not math.isclose(*rates):
        raise ValueError(
            f"cooldown is {config.cooldown:g} of {config.steps:,} steps, which begins before step {step:,}, where the "
            f"run branches: the rate would jump from {rates[0]:.3g} to {rates[1]:.3g}; choose at most "
            f"{(config.steps - step) / config.steps:.10g}"
        )


def check_data(folder: Path, content: str) -> None:
    """Raises ValueError if a checkpoint's run read other text than that with the hash `content`."""
    if read_position(folder).content != content:
        raise ValueError(f"the training data is not that of branch = {folder}; branch with the same data")


def plant(run: RunDirectory, folder: Path) -> None:
    """Make a checkpoint of another run the first of this one, with the metrics that led to it; nothing if it has some.

    Raises:
        FileNotFoundError: it is not there any more.
        OSError: it cannot be copied.
    """
    if checkpoints(run.path):
        return
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the run in {run.path} branches from {folder}, which is not there any more; restore it"
        )
    metrics = folder.parent.parent / "metrics.jsonl"
    if metrics.is_file():  # restoring drops the lines that came after the checkpoint
        files.replace(run.log.file, metrics.read_bytes())
    with new_directory(run.path / "checkpoints" / folder.name) as beside:
        shutil.copytree(folder, beside, dirs_exist_ok=True, copy_function=shutil.copyfile)


def go_on_longer(run: RunDirectory, config: TrainConfig, position: Position, begun: TrainConfig) -> str | None:
    """Settle the schedule of a run that goes on at `position`: its warm-up keeps the steps that it had.

    Changes `position`, and records other steps in all in train.json and metrics.jsonl.

    Args:
        begun: the run's configuration before this call; of a branch that of the run it left.
    Returns:
        what becomes of the schedule; None if it stays.
    Raises:
        ValueError: more steps are done than there shall be.
    """
    if config.steps < position.step:
        raise ValueError(
            f"steps is {config.steps}, but the run in {run.path} has done {position.step:,}; give as many or more"
        )
    before = replace(begun, steps=position.planned or begun.steps) if position.step else config
    if position.warmup is None:
        position.warmup = warmup_steps(before)
    position.planned = config.steps
    if config.steps != run.config().steps:
        run.describe(replace(run.config(), steps=config.steps))
    if all(getattr(before, name) == getattr(config, name) for name in ("steps", "cooldown", "final_lr")):
        return None
    rate = learning_rate(config, position.step, position.warmup)
    line = {"step": position.step, "steps_before": before.steps, "steps": config.steps, "learning_rate": rate}
    if not run.log.holds("schedule", **line):  # of a resumption that saved nothing
        run.log("schedule", **line)
    return becomes(before, config, position.step, position.warmup)
