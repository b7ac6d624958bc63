"""Models of other programs as ours: `convert`, strict about every key and every tensor."""

from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import write_model
from ...config import ModelConfig
from ...host.files import new_directory, replace, vacant
from .blackmamba import BlackMamba
from .format import Format
from .gathering import gather, scatter
from .jamba import Jamba
from .keys import Keys
from .mamba import FalconMamba, Mamba, StateSpaces
from .source import TEMPLATE, Source

__all__ = ["FORMATS", "TEMPLATE", "Converted", "Format", "convert", "find_format", "gather", "scatter"]

FORMATS: dict[str, Format] = {
    each.name: each for each in (Mamba(), FalconMamba(), Jamba(), BlackMamba(), StateSpaces())
}


@dataclass(frozen=True)
class Converted:
    """What became of a model."""

    format: Format
    config: ModelConfig
    tensors: int
    dtype: str
    """of most of its weights"""
    tokenizer: str
    """where it was"""


def convert(source: str, out: str | Path, tokenizer: str | None = None) -> Converted:
    """Write a model of another program as a folder that `load`, `generate`, `eval` and `train --start` take.

    The numbers stay as they are, in their dtype.

    Args:
        source: its folder, its file of weights, or hf:OWNER/NAME for one of the Hugging Face hub.
        out: the new folder.
        tokenizer: see `load_tokenizer`; the one that lies with the model if None.
    Raises:
        ValueError: nothing that we know, a tensor that is missing or not of the model, named, or no tokenizer.
        FileExistsError: there is something at `out`.
        OSError: it cannot be read or written.
    """
    place = vacant(out)  # before gigabytes are read
    found = Source(source)
    keys = Keys(found.config, found.folder / "config.json")
    kind = find_format(keys)
    config = kind.model(keys)
    own = found.tokenizer(tokenizer)
    if own.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {own.vocab_size:,} tokens, more than the {config.vocab_size:,} of the model; "
            "name the one that belongs to it with --tokenizer"
        )
    tensors, template = gather(kind, config, found), found.chat_template()
    with new_directory(place) as folder:
        write_model(folder, config, tensors, own)
        if template:
            replace(folder / TEMPLATE, template)
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()]
    return Converted(kind, config, len(found), max(set(dtypes), key=dtypes.count), tokenizer or str(found.folder))


def find_format(keys: Keys) -> Format:
    """The format of a config.json; raises ValueError for one that is none."""
    if "pattern" in keys:
        raise ValueError(f"{keys.where} is one of ours already; use its folder as it is")
    for each in FORMATS.values():
        if each.recognises(keys):
            return each
    named = keys.values.get("model_type")
    what = f"is of the model_type {named!r}, which" if isinstance(named, str) else "names no model_type, and"
    raise ValueError(f"{keys.where} {what} cannot be converted; known are {', '.join(FORMATS)}")
