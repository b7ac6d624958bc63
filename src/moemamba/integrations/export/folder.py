"""A model as a folder that transformers reads, in one of its own architectures."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ...config import ModelConfig
from ...host.files import replace as replace_file
from ...host.files import write_json
from ...tensors import write_tensors
from ...text import Tokenizer
from ..convert import FORMATS, scatter
from ..portability import plain, served
from .padding import with_idle_norms


def prepared(name: str, config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model as a format has it: for Jamba with inner norms, which may do nothing."""
    if name == "jamba" and plain(config):
        return with_idle_norms(config, tensors)
    if name == "jamba" and config.mamba.inner_norm == "weightless":
        config = config.replace(inner_norm="rmsnorm")
        ones = {
            f"{layer.removesuffix('A_log')}{norm}_norm.weight": torch.ones(size)
            for layer in tensors
            if layer.endswith(".A_log")
            for norm, size in (("dt", config.dt_rank), ("B", config.mamba.d_state), ("C", config.mamba.d_state))
        }
        return config, tensors | ones
    return config, tensors


def for_vllm(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A tied head as a tensor of its own: vLLM's Jamba (0.33) has no tied ones."""
    if served(config) != "jamba" or not config.tie_embeddings:
        return config, tensors
    return config.replace(tie_embeddings=False), tensors | {"head.weight": tensors["embedding.weight"]}


def write_folder(folder: Path, name: str, config: ModelConfig, tensors: dict[str, Tensor], own: Tokenizer) -> None:
    """config.json, model.safetensors and the tokenizer, into an existing folder."""
    kind = FORMATS[name]
    config, tensors = prepared(name, config, tensors)
    theirs = scatter(kind, config, tensors)
    dtype = next(iter(theirs.values())).dtype
    theirs |= {zero: torch.zeros(shape, dtype=dtype) for zero, shape in kind.zeros(config).items()}
    end = own.end_of_text
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", kind.describe(config) | ids)
    write_tensors(folder / "model.safetensors", {name: tensor.contiguous() for name, tensor in theirs.items()})
    write_tokenizer(folder, own)


def write_tokenizer(folder: Path, own: Tokenizer) -> None:
    """tokenizer.json, and what tells transformers which token ends a text."""
    text = own.to_json()
    replace_file(folder / "tokenizer.json", text)
    added = {token["id"]: token["content"] for token in json.loads(text)["added_tokens"]}
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), added[own.end_of_text])
    how = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", how | named)
