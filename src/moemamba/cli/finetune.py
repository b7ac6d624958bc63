"""`moemamba finetune`: a model learns to answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..finetuning.config import FinetuneConfig
from ..host.files import expanded
from .options import Merged, Place, Positional
from .terminal import line, parse, show


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a model on conversations, prompts with completions, or texts, by small matrices (LoRA) or wholly."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    out: Place | None = None
    """the new folder, for generate, eval and export; beside the run, with -finetuned behind its name, if None"""
    config: Merged[FinetuneConfig] = field(default_factory=FinetuneConfig)


def main(arguments: Sequence[str]) -> None:
    asked = parse(Finetune, arguments, "finetune")
    out = expanded(asked.out or f"{asked.run.rstrip('/')}-finetuned")
    from ..finetuning.sft import finetune

    found = finetune(asked.run, out, asked.config)
    rows = [("steps", f"{found.steps:,}", f"of {found.examples:,} examples")]
    if found.before is not None and found.after is not None:
        rows.append(("held out", f"{found.after:.4f}", f"nats a token of an answer; {found.before:.4f} before"))
    if found.text is not None:
        before, after = found.text
        rows.append(
            (
                "text",
                f"{after:.4f}",
                f"nats a token of text that was held out of what was replayed; {before:.4f} before",
            )
        )
    show(rows)
    line(f"written to {found.out}", apart=True)
