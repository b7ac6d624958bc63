"""Models of ours in the formats of other programs: `export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoint import load, model_tensors
from ...config import ModelConfig
from ...host.files import new_directory, vacant
from ...layers.quantised import expect_full
from ...model import MoEMamba
from ..portability import FORMATS, expect_portable, remark, served

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    config: ModelConfig
    file: Path
    """the file, or the folder"""
    remark: str
    """what to know of it; empty for an exact one"""


def export(run: str | Path, to: str, out: str | Path) -> Exported:
    """Write a model in the format of another program.

    Args:
        run: a run directory or a checkpoint.
        to: a name of `portability.FORMATS`.
        out: the new folder, in which the tokenizer lies too.
    Raises:
        ValueError: the format has no place for something in the model, with all reasons, its weights have 8 bits, or a
            package is missing.
        FileExistsError: there is something at `out`.
        OSError: it cannot be read or written.
    """
    if to not in FORMATS:
        raise ValueError(f"there is no format {to!r}; choose one of {', '.join(FORMATS)}")
    place = vacant(out)
    model, tokenizer = load(run)
    expect_full(model)
    expect_portable(to, model.config)
    _expect_unbiased(to, model)
    from .folder import write_tokenizer

    with new_directory(place) as folder:
        match to:
            case "hf":
                from ..transformers import MoEMambaForCausalLM

                with _without_bars():
                    MoEMambaForCausalLM.from_pretrained(run).save_pretrained(folder)
                write_tokenizer(folder, tokenizer)
            case "onnx":
                from .onnx import write_onnx

                write_onnx(folder / "model.onnx", model)
                write_tokenizer(folder, tokenizer)
            case "torch":
                from .onnx import write_program

                write_program(folder / "model.pt2", model)
                write_tokenizer(folder, tokenizer)
            case "gguf":
                from .gguf import write_gguf
                from .llama_cpp import compare

                write_gguf(folder / "model.gguf", model.config, model_tensors(model), tokenizer, str(run))
                compare(folder / "model.gguf", tokenizer)
            case "mamba" | "falcon_mamba" | "jamba":
                from .folder import write_folder

                write_folder(folder, to, model.config, model_tensors(model), tokenizer)
            case "vllm":
                from .folder import for_vllm, write_folder

                write_folder(folder, served(model.config), *for_vllm(model.config, model_tensors(model)), tokenizer)
    return Exported(model.config, place, remark(to, model.config))


def _expect_unbiased(to: str, model: MoEMamba) -> None:
    """Selection biases that loss-free balancing has left: the steps have them, and no other format."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("balance_bias")]
    if to not in ("hf", "onnx", "torch") and any(bool(torch.any(bias)) for bias in biases):
        raise ValueError(f"{to} has no selection bias of a router, and this model was balanced by one (bias_rate)")


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows no progress bars, which end before one could read them and stay in a log."""
    from transformers.utils import logging

    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed:
            logging.enable_progress_bar()
