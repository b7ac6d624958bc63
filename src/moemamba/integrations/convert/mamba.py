"""Mamba: the checkpoints of state-spaces/mamba-* and their -hf forms, `MambaForCausalLM` of transformers."""

from typing import Any

from ...config import MambaConfig, ModelConfig
from .format import MIXER, Format
from .keys import Keys
from .table import Entry, renamed


class Mamba(Format):
    """`model_type: mamba`. The names are those of mamba_ssm but for the embedding's."""

    name, title = "mamba", "transformers' Mamba"
    embedding = "backbone.embeddings.weight"

    def model(self, keys: Keys) -> ModelConfig:
        keys.must("use_bias", False, False, "our projections have no bias")
        keys.must("use_conv_bias", True, True, "our convolution has a bias")
        keys.must("hidden_act", "silu", "silu", "our Mamba layers compute silu")
        keys.must("layer_norm_epsilon", 1e-5, 1e-5, "our norms add 1e-05")
        rank = keys.values.get("time_step_rank", "auto")
        return ModelConfig(
            "M",
            keys.get("num_hidden_layers", int),
            keys.get("hidden_size", int),
            vocab_size=keys.get("vocab_size", int),
            mamba=MambaConfig(
                keys.get("state_size", int, 16),
                keys.get("conv_kernel", int, 4),
                keys.get("expand", float, 2.0),
                None if rank == "auto" else keys.get("time_step_rank", int),
            ),
            tie_embeddings=keys.get("tie_word_embeddings", bool, True),
        )

    def table(self, config: ModelConfig) -> list[Entry]:
        norm = ("norm.weight", "norm.bias") if config.norm == "layernorm" else ("norm.weight",)
        table = [Entry("embedding.weight", (self.embedding,))]
        for layer in range(len(config.layers)):
            table += renamed(f"layers.{layer}.", f"backbone.layers.{layer}.", norm)
            table += renamed(f"layers.{layer}.branches.0.", f"backbone.layers.{layer}.mixer.", MIXER)
        table += [Entry(name, (f"backbone.{name.replace('norm.', 'norm_f.')}",)) for name in norm]
        return table if config.tie_embeddings else [*table, Entry("head.weight", ("lm_head.weight",))]

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return {"lm_head.weight": self.embedding} if config.tie_embeddings else {}

    def missing(self, config: ModelConfig) -> list[str]:
        found = _other_layers(config)
        if config.norm != "rmsnorm" or not config.final_norm:
            found.append("its norms are RMSNorm, one before the head too")
        if config.mamba.expand != int(config.mamba.expand):
            found.append(f"its expand is a whole number, and here it is {config.mamba.expand:g}")
        return found

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_inner,
            "num_hidden_layers": len(config.layers),
            "state_size": config.mamba.d_state,
            "conv_kernel": config.mamba.d_conv,
            "expand": int(config.mamba.expand),
            "time_step_rank": config.dt_rank,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tie_embeddings,
        }


class StateSpaces(Mamba):
    """mamba_ssm's own form: another config.json, and no `model_type`."""

    name, title = "mamba_ssm", "mamba_ssm's Mamba"
    embedding = "backbone.embedding.weight"

    def recognises(self, keys: Keys) -> bool:
        return {"d_model", "n_layer", "vocab_size"} <= keys.values.keys() and "model_type" not in keys

    def model(self, keys: Keys) -> ModelConfig:
        ssm = Keys(keys.values.get("ssm_cfg") or {}, f"{keys.where}: ssm_cfg")
        ssm.must("layer", "Mamba1", "Mamba1", "only Mamba-1 layers can be converted")
        ssm.must("bias", False, False, "our projections have no bias")
        ssm.must("conv_bias", True, True, "our convolution has a bias")
        keys.must("attn_layer_idx", [], [], "our attention layers are not those of mamba_ssm")
        keys.must("d_intermediate", 0, 0, "only Mamba layers can be converted")
        rank, unit = ssm.values.get("dt_rank", "auto"), keys.get("pad_vocab_size_multiple", int, 8)
        if unit < 1:
            raise ValueError(f"{keys.where}: pad_vocab_size_multiple is {unit}; expected 1 or more")
        return ModelConfig(
            "M",
            keys.get("n_layer", int),
            keys.get("d_model", int),
            vocab_size=-(-keys.get("vocab_size", int) // unit) * unit,
            mamba=MambaConfig(
                ssm.get("d_state", int, 16),
                ssm.get("d_conv", int, 4),
                ssm.get("expand", float, 2.0),
                None if rank == "auto" else ssm.get("dt_rank", int),
            ),
            norm="rmsnorm" if keys.get("rms_norm", bool, True) else "layernorm",
            tie_embeddings=keys.get("tie_embeddings", bool, True),
        )

    def missing(self, config: ModelConfig) -> list[str]:
        return _other_layers(config) + ([] if config.final_norm else ["it has a norm before the head"])

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        mamba = config.mamba
        return {
            "d_model": config.d_model,
            "n_layer": len(config.layers),
            "vocab_size": config.vocab_size,
            "ssm_cfg": {
                "d_state": mamba.d_state,
                "d_conv": mamba.d_conv,
                "expand": int(mamba.expand) if mamba.expand == int(mamba.expand) else mamba.expand,
                "dt_rank": config.dt_rank,
            },
            "rms_norm": config.norm == "rmsnorm",
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": config.tie_embeddings,
        }


def _other_layers(config: ModelConfig) -> list[str]:
    return [f"it has Mamba layers alone, and the pattern is {config.pattern}"] if config.pattern.strip("M") else []
