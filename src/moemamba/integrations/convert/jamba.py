"""Jamba, `JambaForCausalLM` of transformers: a layer is a mixer and a feed-forward network (arXiv 2403.19887)."""

from typing import Any

from ...config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, ModelConfig
from ..portability.jamba import JambaLayer, layout, pattern, period
from .format import Format, mixer
from .keys import Keys
from .table import Entry, renamed, rows, stacked, stacked_halves

NORMS = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}


class Jamba(Format):
    """`model_type: jamba`. Our sub-layers 2L and 2L + 1 are the mixer and the feed-forward network of layer L."""

    name, title = "jamba", "transformers' Jamba"

    def model(self, keys: Keys) -> ModelConfig:
        keys.must("hidden_act", "silu", "silu", "our layers compute silu")
        wide = keys.get("intermediate_size", int, 14336)
        rank = keys.values.get("mamba_dt_rank", "auto")
        letters, n_blocks = pattern(self.letters(keys))
        heads = keys.get("num_attention_heads", int, 32)
        return ModelConfig(
            letters,
            n_blocks,
            keys.get("hidden_size", int, 4096),
            vocab_size=keys.get("vocab_size", int, 65536),
            mamba=MambaConfig(
                keys.get("mamba_d_state", int, 16),
                keys.get("mamba_d_conv", int, 4),
                keys.get("mamba_expand", float, 2.0),
                None if rank == "auto" else keys.get("mamba_dt_rank", int),
                inner_norm="rmsnorm",
                conv_bias=keys.get("mamba_conv_bias", bool, True),
                proj_bias=keys.get("mamba_proj_bias", bool, False),
            ),
            experts=ExpertsConfig(
                keys.get("num_experts", int, 16),
                keys.get("num_experts_per_tok", int, 2),
                wide,
                balance_weight=keys.get("router_aux_loss_coef", float, 0.001),
            )
            if "E" in letters
            else ExpertsConfig(),
            attention=AttentionConfig(heads, n_kv_heads=keys.get("num_key_value_heads", int, heads), rotary=False),
            feedforward=FeedForwardConfig(wide),
            norm_eps=keys.get("rms_norm_eps", float, 1e-6),
            tie_embeddings=keys.get("tie_word_embeddings", bool, False),
        )

    def letters(self, keys: Keys) -> list[str]:
        """Two of ours a layer."""
        count, several = keys.get("num_hidden_layers", int, 32), keys.get("num_experts", int, 16) > 1
        periods = [keys.get(name, int, default) for name, default in _PERIODS.items()]
        if min(periods[::2]) < 1 or not 0 < count <= 1 << 16:
            raise ValueError(f"{keys.where}: its layers and periods must be 1 or more")
        attention, first_attention, experts, first_experts = periods
        return [
            ("A" if number % attention == first_attention else "M")
            + ("E" if several and number % experts == first_experts else "F")
            for number in range(count)
        ]

    def table(self, config: ModelConfig) -> list[Entry]:
        table = [
            Entry("embedding.weight", ("model.embed_tokens.weight",)),
            Entry("norm.weight", ("model.final_layernorm.weight",)),
        ]
        for number, layer in enumerate(layout(config)):
            table += self._layer(config, layer, f"model.layers.{number}.")
        return table if config.tie_embeddings else [*table, Entry("head.weight", ("lm_head.weight",))]

    def _layer(self, config: ModelConfig, layer: JambaLayer, theirs: str) -> list[Entry]:
        """The tensors of a layer that are not zero."""
        found = []
        if layer.mixer is not None:
            found.append(Entry(f"layers.{layer.mixer}.norm.weight", (f"{theirs}input_layernorm.weight",)))
            ours = f"layers.{layer.mixer}.branches.0."
            found += attention(config, ours, f"{theirs}self_attn.") if layer.attention else []
            found += [] if layer.attention else mamba(config, ours, f"{theirs}mamba.")
        if layer.feedforward is not None:
            found.append(Entry(f"layers.{layer.feedforward}.norm.weight", (f"{theirs}pre_ff_layernorm.weight",)))
            ours = f"layers.{layer.feedforward}.branches.0."
            make = experts if layer.experts else dense
            found += make(config, ours, f"{theirs}feed_forward.")
        return found

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}

    def zeros(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """What a layer that adds nothing has besides, by name, with its shape."""
        found: dict[str, tuple[int, ...]] = {}
        d, wide = config.d_model, width(config)
        for number, layer in enumerate(layout(config)):
            theirs = f"model.layers.{number}."
            if layer.mixer is None:
                found[f"{theirs}input_layernorm.weight"] = (d,)
                found |= {f"{theirs}self_attn.{name}_proj.weight": (d, d) for name in "qo"}
                found |= {f"{theirs}self_attn.{name}_proj.weight": (d // idle_heads(d), d) for name in "kv"}
            if layer.feedforward is None:
                found[f"{theirs}pre_ff_layernorm.weight"] = (d,)
                count = config.experts.count if layer.experts else 1
                places = [f"experts.{one}." for one in range(count)] if layer.experts else [""]
                for place in places:
                    shapes = {"gate": (wide, d), "up": (wide, d), "down": (d, wide)}
                    found |= {f"{theirs}feed_forward.{place}{n}_proj.weight": shape for n, shape in shapes.items()}
                if layer.experts:
                    found[f"{theirs}feed_forward.router.weight"] = (count, d)
        return found

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        layers = layout(config)
        several = any(layer.experts for layer in layers)
        own, seldom = period([layer.attention for layer in layers]), period([layer.experts for layer in layers])
        assert own is not None
        has_attention = any(layer.mixer is not None for layer in layers if layer.attention)
        heads = (config.n_heads, config.n_kv_heads) if has_attention else (idle_heads(config.d_model), 1)
        return {
            "architectures": ["JambaForCausalLM"],
            "model_type": "jamba",
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_embeddings,
            "hidden_size": config.d_model,
            "intermediate_size": width(config),
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "router_aux_loss_coef": config.experts.balance_weight,
            "num_experts": config.experts.count if several else 1,
            "num_experts_per_tok": config.experts.top_k if several else 1,
            "expert_layer_period": seldom.length if seldom and several else 1,
            "expert_layer_offset": seldom.offset if seldom and several else 0,
            "attn_layer_period": own.length,
            "attn_layer_offset": own.offset,
            "mamba_d_state": config.mamba.d_state,
            "mamba_d_conv": config.mamba.d_conv,
            "mamba_expand": int(config.mamba.expand),
            "mamba_dt_rank": config.dt_rank,
            "mamba_conv_bias": config.mamba.conv_bias,
            "mamba_proj_bias": config.mamba.proj_bias,
            "use_mamba_kernels": False,
        }


_PERIODS = {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1}


def width(config: ModelConfig) -> int:
    """Of experts and dense layers, which is one in Jamba."""
    return config.d_expert if "E" in config.pattern else config.d_ff if "F" in config.pattern else 32


def idle_heads(d_model: int) -> int:
    """Of attention that adds nothing: as many as make its one head of keys narrow."""
    return max(heads for heads in range(1, max(1, d_model // 32) + 1) if d_model % heads == 0)


def mamba(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """A Mamba layer with its inner norms."""
    norms = [Entry(f"{ours}{a}.weight", (f"{theirs}{b}.weight",)) for a, b in NORMS.items()]
    return renamed(ours, theirs, mixer(config)) + norms


def attention(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """Queries, keys and values below each other."""
    keys = config.d_model // config.n_heads * config.n_kv_heads
    each = [f"{theirs}{name}_proj.weight" for name in "qkv"]
    output = Entry(f"{ours}out_proj.weight", (f"{theirs}o_proj.weight",))
    return [rows(f"{ours}qkv_proj.weight", each, (config.d_model, keys, keys)), output]


def dense(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """A feed-forward network; the gate's rows first."""
    halves = [f"{theirs}{name}_proj.weight" for name in ("gate", "up")]
    down = Entry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))
    return [rows(f"{ours}up_proj.weight", halves, (config.d_ff, config.d_ff)), down]


def experts(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """A router, and experts one by one."""
    each = [f"{theirs}experts.{number}." for number in range(config.experts.count)]
    gate, up, down = ([f"{place}{name}_proj.weight" for place in each] for name in ("gate", "up", "down"))
    return [
        Entry(f"{ours}router.weight", (f"{theirs}router.weight",)),
        stacked_halves(f"{ours}experts.up_proj", gate, up),
        stacked(f"{ours}experts.down_proj", down),
    ]
