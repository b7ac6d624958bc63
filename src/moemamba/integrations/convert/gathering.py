"""Our tensors from theirs and back, by a format's table; strict about every name and shape."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import model_tensors
from ...config import ModelConfig
from ...model import MoEMamba
from ...tensors import Stored, not_finite
from .format import Format
from .table import Entry


def gather(kind: Format, config: ModelConfig, stored: Mapping[str, Stored | Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs.

    Raises:
        ValueError: a name is missing or is not of the model, or a shape is another one; the first few are named.
    """
    layers = len(config.pattern) * config.n_blocks
    each = config.experts.n_experts
    experts = config.pattern.count("E") * config.n_blocks * each if isinstance(each, int) else sum(each)
    for count, what in ((layers, "layers"), (experts, "experts")):  # before a table of them is made
        if count > len(stored):
            raise ValueError(f"the model has {count:,} {what}, and the weights only {len(stored):,} tensors")
    table, copies = kind.table(config), kind.copies(config)
    _check_names({name for entry in table for name in entry.theirs}, stored, copies)
    try:
        with torch.device("meta"):
            expected = model_tensors(MoEMamba(config))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError("the model that config.json describes has tensors larger than there can be") from error
    tensors = {}
    for entry in table:
        tensors[entry.ours] = _joined(entry, stored, expected.pop(entry.ours))
    for name, same in copies.items():
        if name in stored and not torch.equal(stored[name][...], stored[same][...]):
            raise ValueError(f"{name} differs from {same}, with which the configuration ties it")
    for name, tensor in expected.items():  # buffers that they do not have, such as a router's selection bias
        if not name.endswith(".balance_bias"):
            raise ValueError(f"{name} has no place among the tensors of {kind.title}")
        tensors[name] = torch.zeros(tensor.shape)
    if strange := not_finite(tensors):
        raise ValueError(f"the weights hold numbers that are not finite ({strange}); fetch them again")
    return tensors


def scatter(kind: Format, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: `gather` the other way."""
    found: dict[str, Tensor] = {}
    for entry in kind.table(config):
        found |= dict(zip(entry.theirs, entry.split(tensors[entry.ours]), strict=True))
    return found


def _check_names(due: set[str], stored: Mapping[str, Any], copies: Mapping[str, str]) -> None:
    missing = sorted(due - stored.keys())
    extra = sorted(stored.keys() - due - copies.keys())
    if not (missing or extra):
        return
    said = [f"{name} is missing" for name in missing[:3]] + [f"{name[:80]!r} is not of it" for name in extra[:3]]
    more = len(missing) + len(extra) - len(said)
    raise ValueError(
        f"the weights are not those of the model that config.json describes: {'; '.join(said)}"
        + (f"; and {more:,} more" if more else "")
    )


def _joined(entry: Entry, stored: Mapping[str, Stored | Tensor], expected: Tensor) -> Tensor:
    parts = [stored[name][...] for name in entry.theirs]
    shapes = ", ".join(sorted({"x".join(map(str, part.shape)) for part in parts}))
    try:
        joined = entry.join(parts)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{entry.theirs[0]} and what belongs to it have shapes that do not ({shapes})") from error
    if joined.shape != expected.shape or not joined.is_floating_point():
        wanted, of = "x".join(map(str, expected.shape)), f" of {len(parts)}" if len(parts) > 1 else ""
        kind = str(joined.dtype).removeprefix("torch.")
        raise ValueError(f"{entry.theirs[0]} is {shapes} {kind}{of}; expected numbers for {entry.ours}, {wanted}")
    return joined
