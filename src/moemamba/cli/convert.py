"""`moemamba convert`: a model of another program as one of ours."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..counting import count_parameters
from .options import Place, Positional
from .terminal import line, parse, show


@dataclass(frozen=True)
class Convert:
    """Make a model of another program one of ours: its configuration, its weights, exactly, and its tokenizer."""

    source: Positional[Place]
    """a folder with config.json and weights (safetensors or .bin), the file of the weights, or hf:OWNER/NAME for a
    model of the Hugging Face hub"""
    out: Place = "runs/converted"
    """the new folder, for generate, eval, finetune and train --start"""
    tokenizer: Place | None = None
    """a tokenizer.json or the folder of one; the one that lies with the model if None"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Convert, arguments, "convert")
    from ..integrations.convert import convert

    found = convert(asked.source, asked.out, asked.tokenizer)
    count = count_parameters(found.config)
    show(
        [
            ("from", f"{found.format.title}, {found.tensors:,} tensors, {found.dtype}"),
            ("model", f"{found.config.pattern} × {found.config.n_blocks}, d_model {found.config.d_model}"),
            ("parameters", f"{count.total:,}, {count.active:,} active, {count.embedding:,} of embedding and head"),
            ("tokenizer", found.tokenizer),
        ]
    )
    line(f"written to {asked.out}. Go on with: moemamba generate {asked.out} --prompt ...", apart=True)
