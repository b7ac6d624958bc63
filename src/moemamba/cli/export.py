"""`moemamba export`: a model in the format of another program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..host.files import expanded
from .options import Place, Positional
from .terminal import line, parse


@dataclass(frozen=True)
class Export:
    """Write a model in the format of another program. What cannot go is said; `moemamba info` says it before
    training."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    to: Literal["hf", "mamba", "falcon_mamba", "jamba", "vllm", "gguf", "onnx", "torch"] = "gguf"
    """gguf: llama.cpp; hf: transformers with this package beside it; mamba, falcon_mamba, jamba: architectures of
    transformers; vllm: the one of these that fits; onnx: a step for ONNX Runtime; torch: a step for
    torch.export.load"""
    out: Place | None = None
    """the new folder; beside the run, with the format behind its name, if None"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Export, arguments, "export")
    out = expanded(asked.out or f"{asked.run.rstrip('/')}-{asked.to}")
    from ..integrations.export import export

    found = export(asked.run, asked.to, out)
    line(f"written to {found.file}{f': {found.remark}' if found.remark else ''}")
