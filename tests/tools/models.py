"""A model for every letter of the pattern, and their ways to mix."""

from dataclasses import replace

import torch

from moemamba import ModelConfig, MoEMamba
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, RoutedMambaConfig
from moemamba.counting import state_bytes
from moemamba.letters import LETTERS

CAPACITY = ExpertsConfig(4, capacity_factor=1.0, activation="relu")
SIGMOID = ExpertsConfig(4, 2, activation="geglu", scores="sigmoid", router_bias=True, bias=True, n_shared_experts=1)
MODELS = {
    **{letter: ModelConfig(letter) for letter in LETTERS},
    "F biases": ModelConfig("F", feedforward=FeedForwardConfig(bias=True)),
    "M inner norms": ModelConfig("M", mamba=MambaConfig(inner_norm="rmsnorm", conv_bias=False), head_bias=True),
    "M weightless": ModelConfig("M", mamba=MambaConfig(inner_norm="weightless", inner_norm_eps=1e-4, proj_bias=True)),
    "A fewer keys": ModelConfig(
        "A", attention=AttentionConfig(4, n_kv_heads=2, rotary=False, qkv_bias=True, out_bias=True)
    ),
    "E sigmoid": ModelConfig("E", experts=SIGMOID, norm_eps=1e-3, final_norm_kind="layernorm"),
    "F squared": ModelConfig("F", feedforward=FeedForwardConfig(activation="relu2")),
    "R shared": ModelConfig("R", routed=RoutedMambaConfig(experts=ExpertsConfig(4, top_k=2))),
    "R independent": ModelConfig("R", routed=RoutedMambaConfig(("gate", "out"), "independent", ExpertsConfig(3))),
    "(ME)": ModelConfig("(ME)", experts=ExpertsConfig(4, top_k=2, n_shared_experts=1)),
    "mixed": ModelConfig("ME(MA)R", n_blocks=1, experts=CAPACITY),
    "uneven": ModelConfig(
        "(ME)R",
        n_blocks=2,
        experts=ExpertsConfig((2, 5), top_k=2),
        routed=RoutedMambaConfig(("out",), "independent", ExpertsConfig((3, 1))),
    ),
}
MIXING = [name for name, config in MODELS.items() if state_bytes(config, 1)]
ROUTING = [name for name, config in MODELS.items() if config.routers]
BACKENDS = [("reference", torch.float64), ("cpu", torch.float32)]
LENGTH, PROBE = 9, 3


def build(name, dtype=torch.float64):
    heads = MODELS[name].attention.n_heads or 2
    config = replace(MODELS[name], d_model=16, vocab_size=31, attention=replace(MODELS[name].attention, n_heads=heads))
    torch.manual_seed(7)
    model = MoEMamba(config.replace(n_blocks=min(2, config.n_blocks))).to(dtype).eval()
    with torch.no_grad():  # away from the special values of the initialisation
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens_of(rows, length=LENGTH + PROBE):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(3))
