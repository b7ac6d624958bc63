"""`moemamba paper race`: entries trained and judged by the rules of docs/race.md."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host.files import expanded
from ..training.config import TrainConfig
from .terminal import line, show, stopped

if TYPE_CHECKING:
    from ..experiments.paper.race import Record
    from .paper import Paper

UNUSED = (
    "scale",
    "validation",
    "test",
    "test_tokens",
    "eval_tokens",
    "steps",
    "learning_rates",
    "tuning_steps",
    "jobs",
)


def race(asked: "Paper", command: str) -> None:
    """Train every entry with every seed, judge it, and print the table and its lines for docs/race.md.

    Raises:
        ValueError: no entry, no corpus, or what `train` raises.
    """
    from ..experiments.paper.race import configured, corpus, entry

    if not asked.entry or not isinstance(asked.data, str):
        raise ValueError(
            "race needs --data, the folder that benchmarks/corpus.py has written, and --entry, a model and its recipe: "
            "moemamba paper race --data corpus --entry mamba-25m,learning_rate=0.001,batch_size=256,steps=6000"
        )
    usual = {field.name: field.default for field in dataclasses.fields(asked)}
    if unused := [name for name in UNUSED if getattr(asked, name) != usual[name]]:
        option = unused[0].replace("_", "-")
        raise ValueError(f"--{option} does not go with race: its rules fix that, or an --entry says it (docs/race.md)")
    entries = [entry(text) for text in asked.entry]
    texts: dict[str, Any] = dict(corpus(asked.data))
    base = TrainConfig(
        **texts,
        tokenizer=asked.tokenizer or "bytes",
        device=asked.device,
        compile=asked.compile,
    )
    out = expanded(asked.out or "runs/race")
    plan = [(each, seed) for each in entries for seed in range(asked.seeds or 1)]
    configs = [(each.name, configured(each, base, seed, out)) for each, seed in plan]
    try:
        records = [_run(name, config, command) for name, config in configs]
    except KeyboardInterrupt:
        stopped(out, command)
        raise
    from ..experiments.paper.race import HEADER, TARGET, markdown_row, rows

    print(f"\nTime to {TARGET:g} bits per byte of the held-out package:\n")
    show(rows(records), HEADER)
    print("\nFor docs/race.md:")
    for row in rows(records):
        line(markdown_row(row))
    line(f"records: {out}/*/seed-*/race.json")


def _run(name: str, config: TrainConfig, command: str) -> "Record":
    """Train, or go on with, one run, and write down what it came to."""
    import torch

    from .. import __version__
    from ..device import find_device
    from ..experiments.paper.race import judged, write_record
    from ..training.loop import train

    device = find_device(config.device)
    train(config, "auto")
    known = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    record = judged(Path(config.run), name, command, known, __version__)
    write_record(record, Path(config.run) / "race.json")
    return record
