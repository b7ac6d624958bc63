"""`moemamba info`: what a model is and costs, from its configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..counting import count_parameters, flops_per_token, memory, state_bytes, sublayers
from ..counting import size as size
from ..host.files import check_regular, expanded
from ..integrations.portability import FORMATS, obstacles, remark
from ..presets import PRESETS, hint, preset
from ..reading import read_config, to_dict, validate
from .options import Place, Positional
from .terminal import line, parse, show, show_json


@dataclass(frozen=True)
class Info:
    """Layers, parameters, operations and memory of a model, without building it."""

    model: Positional[Place]
    """a preset, a run directory or a config.json"""
    context: int = 1024
    """tokens in the sequence that operations and state are counted for"""
    json: bool = False
    """print one JSON object in place of the tables; numbers are plain, sizes in bytes"""

    def __post_init__(self) -> None:
        validate(self, positive=("context",))


def main(arguments: Sequence[str]) -> None:
    asked = parse(Info, arguments, "info")
    config = find_config(asked.model)
    if asked.json:
        show_json(_numbers(config, asked.context, on_disk(asked.model)))
        return
    line(f"{config.pattern} × {config.n_blocks}, d_model {config.d_model}")
    print()
    show(layers(config), ("layer", "letter", "what", "parameters", "active", "times"))
    print()
    show(costs(config, asked.context))
    print()
    if stored := on_disk(asked.model):
        show([("on disk", size(sum(stored.values())), ", ".join(f"{size(n)} of {kind}" for kind, n in stored.items()))])
        print()
    show(exports(config))


def find_config(source: str) -> ModelConfig:
    """The model of a preset, a run directory or checkpoint, or a config.json.

    Raises:
        ValueError: it is none of these, or a configuration that cannot work.
    """
    path = expanded(source)
    file = path / "config.json" if path.is_dir() else path
    if source not in PRESETS and path.is_dir() and not file.is_file():
        raise ValueError(f"{source} has no config.json; name a run directory, a checkpoint, a config.json or a preset")
    if source not in PRESETS and len(path.parts) > 1 and not path.exists():
        raise ValueError(
            f"there is no model at {source}; name a run directory, a checkpoint, a config.json or a preset"
        )
    if source in PRESETS:
        return preset(source)
    if not file.is_file():
        raise ValueError(f"there is no preset, run or file {source!r}; {hint(source)}")
    check_regular(file)
    if path.suffix.lower() not in ("", ".json") or _is_text(file):
        raise ValueError(f"{source} is no configuration; a text to train on goes to --data {source}")
    return read_config(ModelConfig, file)


def _is_text(file: Path) -> bool:
    """Whether a file is certainly no JSON object."""
    with file.open("rb") as stream:
        begins = stream.read(4096).lstrip()[:1]
    return file.suffix.lower() != ".json" and begins != b"{"


def on_disk(source: str) -> dict[str, int]:
    """Bytes of the weights of a run or a model by number format, the most first; empty where there are none yet."""
    if source in PRESETS or not expanded(source).is_dir():
        return {}
    from ..checkpoint import newest_of, open_weights

    found: dict[str, int] = {}
    if folder := newest_of(expanded(source)):
        for tensor in open_weights(folder).values():
            kind = str(tensor.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _numbers(config: ModelConfig, context: int, stored: dict[str, int]) -> dict[str, Any]:
    """What the tables say, for programs."""
    count = count_parameters(config)
    weights = count.total + count.embedding
    return {
        "config": to_dict(config),
        "parameters": count.total,
        "active": count.active,
        "embedding": count.embedding,
        "context": context,
        "flops_per_token": flops_per_token(config, context),
        "bytes": {
            "weights": 4 * weights,
            "gradients": 4 * weights,
            "optimizer": 8 * weights,
            "state": state_bytes(config, context),
            "stored": stored,
        },
        "exports": {name: {"possible": not reasons, "reasons": reasons} for name, reasons in obstacles(config).items()},
    }


def layers(config: ModelConfig) -> list[tuple[str, ...]]:
    """One row for each residual sub-layer of the pattern; of the whole model where its blocks differ."""
    rows: list[tuple[str, ...]] = []
    for number, each in enumerate(sublayers(config)):
        what = ", and in parallel ".join(letter.describe(own) for letter, own in each.branches)
        rows.append((f"{number}", each.letters, what, f"{each.total:,}", f"{each.active:,}", f"× {each.times}"))
    return rows


def costs(config: ModelConfig, context: int) -> list[tuple[str, ...]]:
    """Parameters, operations and memory of the whole model, each with its value and what it means."""
    count = count_parameters(config)
    needs = memory(config)
    return [
        ("parameters", f"{count.total:,}", "without embedding and head"),
        ("active", f"{count.active:,}", "of them, those that one token passes through"),
        ("embedding, head", f"{count.embedding:,}", f"for a vocabulary of {config.vocab_size:,}"),
        ("forward pass", f"{flops_per_token(config, context) / 1e6:,.1f} MFLOP", f"a token, at context {context:,}"),
        ("weights", size(needs.weights), f"float32; {size(needs.weights // 2)} in bfloat16"),
        ("gradients", size(needs.gradients), "float32, while training"),
        ("optimiser", size(needs.optimizer), "float32, AdamW's two moments, while training"),
        ("state", size(state_bytes(config, context)), f"of one sequence after {context:,} tokens"),
    ]


def exports(config: ModelConfig) -> list[tuple[str, ...]]:
    """One row a format that `moemamba export` knows: whether a model can go there, and if not, why not."""
    rows: list[tuple[str, ...]] = []
    for name, reasons in obstacles(config).items():
        says = f"no: {'; '.join(reasons)}" if reasons else f"yes: {remark(name, config) or FORMATS[name][0]}"
        rows.append((f"export to {name}", says))
    return rows
