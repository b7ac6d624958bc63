"""Mamba: the checkpoints of state-spaces/mamba-* and their -hf forms, `MambaForCausalLM` of transformers."""

from typing import Any

from ...config import MambaConfig, ModelConfig
from .format import Format, mixer
from .keys import Keys
from .table import Entry, renamed


class Mamba(Format):
    """`model_type: mamba`. The names are those of mamba_ssm but for the embedding's."""

    name, title = "mamba", "transformers' Mamba"
    embedding = "backbone.embeddings.weight"

    def model(self, keys: Keys) -> ModelConfig:
        keys.must("hidden_act", "silu", "silu", "our Mamba layers compute silu")
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
                **self.inside(keys),
                conv_bias=keys.get("use_conv_bias", bool, True),
                proj_bias=keys.get("use_bias", bool, False),
            ),
            norm_eps=keys.get("layer_norm_epsilon", float, 1e-5),
            tie_embeddings=keys.get("tie_word_embeddings", bool, True),
        )

    def inside(self, keys: Keys) -> dict[str, Any]:
        """Of the norms of dt, B and C."""
        return {}

    def table(self, config: ModelConfig) -> list[Entry]:
        norm = ("norm.weight", "norm.bias") if config.norm == "layernorm" else ("norm.weight",)
        table = [Entry("embedding.weight", (self.embedding,))]
        for layer in range(len(config.layers)):
            table += renamed(f"layers.{layer}.", f"backbone.layers.{layer}.", norm)
            table += renamed(f"layers.{layer}.branches.0.", f"backbone.layers.{layer}.mixer.", mixer(config))
        table += [Entry(name, (f"backbone.{name.replace('norm.', 'norm_f.')}",)) for name in norm]
        return table if config.tie_embeddings else [*table, Entry("head.weight", ("lm_head.weight",))]

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return {"lm_head.weight": self.embedding} if config.tie_embeddings else {}

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
            "layer_norm_epsilon": config.norm_eps,
            "use_bias": config.mamba.proj_bias,
            "use_conv_bias": config.mamba.conv_bias,
            "hidden_act": "silu",
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tie_embeddings,
        }


class FalconMamba(Mamba):
    """`model_type: falcon_mamba`: norms without weights of dt, B and C (arXiv 2410.05355)."""

    name, title = "falcon_mamba", "transformers' Falcon-Mamba"

    def inside(self, keys: Keys) -> dict[str, Any]:
        return {"inner_norm": "weightless", "inner_norm_eps": keys.get("mixer_rms_eps", float, 1e-6)}

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        named = {"architectures": ["FalconMambaForCausalLM"], "model_type": self.name}
        return super().describe(config) | named | {"mixer_rms_eps": config.inner_norm_eps}


class StateSpaces(Mamba):
    """mamba_ssm's own form: another config.json, and no `model_type`."""

    name, title = "mamba_ssm", "mamba_ssm's Mamba"
    embedding = "backbone.embedding.weight"

    def recognises(self, keys: Keys) -> bool:
        return {"d_model", "n_layer", "vocab_size"} <= keys.values.keys() and "model_type" not in keys

    def model(self, keys: Keys) -> ModelConfig:
        ssm = Keys(keys.values.get("ssm_cfg") or {}, f"{keys.where}: ssm_cfg")
        ssm.must("layer", "Mamba1", "Mamba1", "only Mamba-1 layers can be converted")
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
                conv_bias=ssm.get("conv_bias", bool, True),
                proj_bias=ssm.get("bias", bool, False),
            ),
            norm="rmsnorm" if keys.get("rms_norm", bool, True) else "layernorm",
            tie_embeddings=keys.get("tie_embeddings", bool, True),
        )
