"""The models of the paper by name, with its choices, and small ones with today's. No torch here."""

import difflib
from typing import Any

from .config import ModelConfig
from .letters import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, RoutedMambaConfig


def _paper(pattern: str, n_blocks: int, d_model: int, **parts: Any) -> ModelConfig:
    """MoE-Mamba's own recipe (arXiv 2401.04081 and its authors' code): LayerNorm, no final norm, untied head."""
    return ModelConfig(
        pattern, n_blocks, d_model, vocab_size=50257, norm="layernorm", final_norm=False, init="paper", **parts
    )


def _switch(n_experts: int, d_expert: int) -> ExpertsConfig:
    """Switch routing as in the paper: top-1, capacity factor 1, ReLU, balance weight 0.01."""
    return ExpertsConfig(n_experts, d_expert=d_expert, activation="relu", capacity_factor=1.0, z_weight=0.0)


def _inner(*projections: Any, n_experts: int) -> RoutedMambaConfig:
    return RoutedMambaConfig(projections, "independent", _switch(n_experts, 352))


def _dense(d_ff: int) -> FeedForwardConfig:
    return FeedForwardConfig(d_ff, activation="relu", bias=True)


_inner_norm = MambaConfig(inner_norm="rmsnorm")
_heads_8, _heads_12 = AttentionConfig(n_heads=8), AttentionConfig(n_heads=12)

PRESETS: dict[str, ModelConfig] = {
    # The paper's tables 5 and 6.
    "mamba-25m": _paper("M", 16, 512),
    "moe-mamba-25m": _paper("ME", 8, 512, experts=_switch(42, 1536)),
    "transformer-25m": _paper("AF", 8, 512, attention=_heads_8, feedforward=_dense(2048)),
    "transformer-moe-25m": _paper("AE", 8, 512, attention=_heads_8, experts=_switch(32, 2048)),
    "mamba-100m": _paper("M", 32, 768),
    "moe-mamba-100m": _paper("ME", 16, 768, experts=_switch(42, 2304)),
    "transformer-moe-100m": _paper("AE", 16, 768, attention=_heads_12, experts=_switch(32, 3072)),
    # Its ablations: one expert, parallel blocks (table 7), experts inside the Mamba block (table 3, a best placement).
    "mamba-mlp-25m": _paper("MF", 8, 512, feedforward=FeedForwardConfig(1536, activation="relu")),
    "parallel-moe-mamba-25m": _paper("(ME)", 8, 512, experts=_switch(32, 1536)),
    "inner-moe-mamba-25m": _paper("MR", 8, 512, routed=_inner("out", n_experts=48)),
    # Beyond the paper: finer experts, four for each token, dropless, balanced by a bias; and the baseline with all of
    # it that can help a model without experts. docs/results.md and docs/log.md have the evidence, at smaller sizes.
    "mamba-25m-plus": ModelConfig("M", 16, 512, vocab_size=50257),
    "moe-mamba-25m-plus": ModelConfig(
        "ME",
        8,
        512,
        vocab_size=50257,
        experts=ExpertsConfig(128, top_k=4, d_expert=256, balance_weight=0.001, bias_rate=0.001),
    ),
    # With norms inside the Mamba layers, as Jamba has them: these can go to llama.cpp and vLLM, exactly.
    "moe-mamba-25m-portable": ModelConfig(
        "ME", 8, 512, vocab_size=50257, mamba=_inner_norm, experts=ExpertsConfig(42, d_expert=1024)
    ),
    # For a laptop: bytes, and the choices that the field has since converged on. Each group is of equal active size.
    "mamba-tiny": ModelConfig("M", 8, 128),
    "moe-mamba-tiny": ModelConfig("ME", 4, 128, experts=ExpertsConfig(8)),
    "transformer-tiny": ModelConfig("AF", 4, 128, attention=AttentionConfig(n_heads=4)),
    "transformer-moe-tiny": ModelConfig(
        "AE", 4, 128, attention=AttentionConfig(n_heads=4), experts=ExpertsConfig(8, d_expert=341)
    ),
    "moe-mamba-tiny-portable": ModelConfig("ME", 4, 128, mamba=_inner_norm, experts=ExpertsConfig(8)),
    "mamba-small": ModelConfig("M", 12, 256),
    "moe-mamba-small": ModelConfig("ME", 6, 256, experts=ExpertsConfig(16)),
    "moe-mamba-small-portable": ModelConfig("ME", 6, 256, mamba=_inner_norm, experts=ExpertsConfig(16)),
    "transformer-small": ModelConfig("AF", 6, 256),
    "transformer-moe-small": ModelConfig("AE", 6, 256, experts=ExpertsConfig(16, d_expert=682)),
    "routed-mamba-small": ModelConfig(
        "R", 12, 256, routed=RoutedMambaConfig(experts=ExpertsConfig(8, balance_weight=0))
    ),
}


def presets() -> list[str]:
    """Names that `preset` knows."""
    return list(PRESETS)


def hint(name: str) -> str:
    """What to say of a name that no preset has."""
    near = difflib.get_close_matches(name, PRESETS, 1, 0.6)
    return f"did you mean {near[0]}?" if near else "moemamba --help lists them, and so does moemamba.presets()"


def preset(name: str, **changes: Any) -> ModelConfig:
    """A named model, with fields changed if wanted: `preset("moe-mamba-25m", n_experts=32)`.

    Raises:
        ValueError: no preset has that name, or a change is not a field.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; {hint(name)}")
    return PRESETS[name].replace(**changes)
