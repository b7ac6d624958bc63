"""GGUF, the file of llama.cpp and what is built on it: Mamba, or Jamba with norms that may do nothing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...text import Tokenizer
from ..convert import FORMATS, scatter
from ..portability import architecture
from .folder import prepared
from .gguf_vocabulary import Vocabulary, vocabulary

CONTEXT = 32768
"""tokens that a program makes room for unasked; Mamba itself has no limit"""

# Names below a layer of transformers' Jamba, and of its Mamba, in llama.cpp.
JAMBA = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_ff_layernorm.weight": "ffn_norm.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mamba.dt_layernorm.weight": "ssm_dt_norm.weight",
    "mamba.b_layernorm.weight": "ssm_b_norm.weight",
    "mamba.c_layernorm.weight": "ssm_c_norm.weight",
}
MIXER = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "x_proj.weight": "ssm_x.weight",
    "dt_proj.weight": "ssm_dt.weight",
    "dt_proj.bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "out_proj.weight": "ssm_out.weight",
}
LAYER = (
    JAMBA
    | {"norm.weight": "attn_norm.weight"}
    | {f"{place}.{theirs}": ours for place in ("mamba", "mixer") for theirs, ours in MIXER.items()}
)
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.final_layernorm.weight": "output_norm.weight",
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(file: Path, config: ModelConfig, tensors: dict[str, Tensor], own: Tokenizer, name: str) -> None:
    """Write a model that `portability` has nothing against, in float32.

    Raises:
        ValueError: llama.cpp would not split text as the tokenizer does, or the package gguf is not installed.
    """
    words, kind = vocabulary(own, config.vocab_size), architecture(config)
    writer = _writer(file, kind)
    config, tensors = prepared(kind, config, tensors)
    described = FORMATS[kind].describe(config)
    writer.add_name(Path(name).name)
    (_describe_jamba if kind == "jamba" else _describe_mamba)(writer, config, described)
    _describe_state(writer, config)
    _describe_words(writer, words)
    for tensor_name, tensor in named(kind, config, tensors).items():
        writer.add_tensor(tensor_name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _writer(file: Path, kind: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF needs its package ({error}); pip install 'moemamba[gguf]'") from error
    return gguf.GGUFWriter(str(file), kind)


def named(kind: str, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by llama.cpp's names: A itself and not its logarithm, the experts of a layer on top of each other."""
    theirs = scatter(FORMATS[kind], config, tensors)
    zeros = FORMATS[kind].zeros(config)
    theirs |= {name: torch.zeros(shape) for name, shape in zeros.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name in WHOLE:
            found[WHOLE[name]] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        if ".experts." in rest:
            continue
        value = -torch.exp(tensor.float()) if rest.endswith("A_log") else tensor
        found[f"blk.{number}.{LAYER[rest]}"] = value.squeeze(1) if rest.endswith("conv1d.weight") else value
    for place in [name.removesuffix("router.weight") for name in theirs if name.endswith(".router.weight")]:
        for part in ("gate", "up", "down"):
            each = [theirs[f"{place}experts.{e}.{part}_proj.weight"] for e in range(config.experts.count)]
            found[f"blk.{place.split('.')[2]}.ffn_{part}_exps.weight"] = torch.stack(each)
    return found


def _describe_mamba(writer: Any, config: ModelConfig, described: dict[str, Any]) -> None:
    writer.add_block_count(described["num_hidden_layers"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_dt_b_c_rms(config.mamba.inner_norm == "weightless")


def _describe_jamba(writer: Any, config: ModelConfig, described: dict[str, Any]) -> None:
    layers, heads = described["num_hidden_layers"], described["num_key_value_heads"]
    period, offset = described["attn_layer_period"], described["attn_layer_offset"]
    writer.add_block_count(layers)
    writer.add_feed_forward_length(described["intermediate_size"])
    writer.add_head_count(described["num_attention_heads"])
    writer.add_head_count_kv([heads if number % period == offset else 0 for number in range(layers)])
    if described["num_experts"] > 1:
        writer.add_expert_count(described["num_experts"])
        writer.add_expert_used_count(described["num_experts_per_tok"])


def _describe_state(writer: Any, config: ModelConfig) -> None:
    import gguf

    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_ssm_conv_kernel(config.mamba.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.mamba.d_state)
    writer.add_ssm_time_step_rank(config.dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _describe_words(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.end)
    writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(False)
