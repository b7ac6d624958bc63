"""Floor 0: configurations, presets and counting, none of which need torch."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moemamba import MoEMamba, TrainConfig, count_parameters, ops, preset, presets
from moemamba.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    MambaConfig,
    ModelConfig,
    RoutedMambaConfig,
    parse_pattern,
)
from moemamba.counting import flops_per_token, state_bytes
from moemamba.reading import from_dict, to_dict

# Non-embedding parameters, total and active, as the paper's tables round them and its authors' code counts them.
PAPER = {
    "mamba-25m": (27_131_904, 27_131_904),
    "moe-mamba-25m": (542_228_480, 26_329_088),
    "transformer-25m": (25_202_688, 25_202_688),
    "transformer-moe-25m": (545_406_976, 25_313_280),
    "mamba-100m": (120_717_312, 120_717_312),
    "moe-mamba-100m": (2_439_069_696, 117_522_432),
    "transformer-moe-100m": (2_454_110_208, 113_688_576),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_papers_parameter_counts(name):
    count = count_parameters(preset(name))
    assert (count.total, count.active) == PAPER[name]


def test_a_preset_takes_changes_of_any_part():
    config = preset("moe-mamba-25m", n_experts=32, n_blocks=4)
    assert config.experts.n_experts == 32 and config.n_blocks == 4 and config.experts.d_expert == 1536
    assert round(count_parameters(preset("moe-mamba-25m", n_experts=32)).total / 1e6, 2) == 416.36


EXPERTS = tuple(f"experts.{name}" for name in ("up_proj", "down_proj", "up_bias", "down_bias"))
VARIANTS = {
    **{name: preset(name) for name in presets()},
    "tied": ModelConfig("MF", 2, 48, tie_embeddings=True, feedforward=FeedForwardConfig(40, "gelu", bias=True)),
    "odd": ModelConfig("M(ME)A", 3, 36, attention=AttentionConfig(3), norm="layernorm", final_norm=False),
    "shared experts": ModelConfig("E", 2, 32, experts=ExpertsConfig(4, top_k=2, n_shared_experts=2)),
    "inner norms": ModelConfig("MR", 2, 32, mamba=MambaConfig(inner_norm="rmsnorm", conv_bias=False), head_bias=True),
    "weightless": ModelConfig("M", 2, 32, mamba=MambaConfig(inner_norm="weightless", proj_bias=True)),
    "fewer keys": ModelConfig(
        "A", 2, 32, attention=AttentionConfig(4, n_kv_heads=1, rotary=False, qkv_bias=True, out_bias=True)
    ),
    "biases": ModelConfig("E", 2, 32, experts=ExpertsConfig(3, n_shared_experts=2, bias=True, router_bias=True)),
    "geglu": ModelConfig("EF", 2, 32, experts=ExpertsConfig(activation="geglu"), final_norm_kind="layernorm"),
    "uneven": ModelConfig(
        "E(ER)", 2, 32, experts=ExpertsConfig((2, 3, 4, 7), 2), routed=RoutedMambaConfig(experts=ExpertsConfig((8, 1)))
    ),
    "routed, shared": ModelConfig("R", 2, 32, routed=RoutedMambaConfig(("conv",))),
    "routed, independent": ModelConfig("R", 2, 32, routed=RoutedMambaConfig(("gate", "out"), "independent")),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_counting_agrees_with_the_model(config):
    with torch.device("meta"):
        model = MoEMamba(config)
    count = count_parameters(config)
    assert count.total + count.embedding == sum(p.numel() for p in model.parameters())
    assert len(config.routers) == len(model.router_names)
    unused = sum(
        parameter.numel() * (experts.count - experts.top_k) // experts.count
        for path, experts in zip(model.router_names, config.routers, strict=True)
        for name, parameter in model.get_submodule(path).named_parameters()
        if name.endswith((*EXPERTS, "conv_proj.weight", "gate_proj.weight", "out_proj.weight"))
        and (parameter.ndim == 3 or name.endswith("_bias"))
    )
    assert count.active == count.total - unused


@pytest.mark.parametrize("keys", [2, 1])
@pytest.mark.parametrize("pattern", ["M", "A", "ME"])
def test_state_and_flops_match_what_the_model_does(pattern, keys):
    config = ModelConfig(pattern, 2, 32, attention=AttentionConfig(2, n_kv_heads=keys))
    model = MoEMamba(config).eval()
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        assert model(tokens).state.nbytes == state_bytes(config, context=6)
        with ops.backend("reference"), FlopCounterMode(display=False) as counter:  # it cannot look into kernels
            model(tokens)
    products = 6 * flops_per_token(config, 0) - 6 * 2 * pattern.count("M") * 9 * config.d_inner * config.mamba.d_state
    # The formula counts every weight once for a token; the counter sees products only, so norms and the like remain.
    assert counter.get_total_flops() == pytest.approx(products, rel=0.06)


def test_json_round_trip():
    for config in VARIANTS.values():
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_new_options_are_written_only_where_they_are_used():
    """So that files without them are the same bytes as ever."""
    written = {"d_state": 16, "d_conv": 4, "expand": 2.0, "dt_rank": None}
    assert to_dict(ModelConfig())["mamba"] == written
    assert to_dict(ModelConfig())["attention"] == {"n_heads": None, "rope_base": 10_000.0}
    assert list(to_dict(ModelConfig()))[-2:] == ["tie_embeddings", "init"]
    config = ModelConfig("M", mamba=MambaConfig(inner_norm="rmsnorm"), norm_eps=1e-6)
    values = to_dict(config)
    assert values["mamba"] == written | {"inner_norm": "rmsnorm"} and values["norm_eps"] == 1e-6
    assert from_dict(ModelConfig, values) == config
    assert to_dict(TrainConfig(model=ModelConfig()))["model"] == to_dict(ModelConfig())


def test_patterns():
    assert parse_pattern("M(ME)E") == ("M", "ME", "E")
    assert ModelConfig("ME", n_blocks=2).layers == ("M", "E", "M", "E")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("moe-mamba-24m"), "there is no preset 'moe-mamba-24m'; did you mean moe-mamba-25m?"),
        (lambda: preset("mamba-25m", d_modle=3), "d_modle is no field of the configuration"),
        (lambda: preset("mamba-25m", activation="relu"), "activation would change nothing"),
        (lambda: ModelConfig("MX"), "'X' at position 1; use the letters M (Mamba)"),
        (lambda: ModelConfig("M(E"), "lacks a closing parenthesis"),
        (lambda: ModelConfig(""), "has no layer"),
        (lambda: ModelConfig(d_model=-5), "d_model is -5; it must be greater than 0"),
        (lambda: ModelConfig(d_model=2.5), "d_model is 2.5; expected a whole number"),
        (lambda: ModelConfig(norm="batch"), "norm is 'batch'; expected one of 'rmsnorm', 'layernorm'"),
        (lambda: ModelConfig("A", d_model=100, attention=AttentionConfig(3)), "n_heads is 3"),
        (lambda: preset("mamba-tiny", expand=0.001), "expand is 0.001, of which d_model = 128 leaves no channel"),
        (lambda: ModelConfig("A", 1, 64, attention=AttentionConfig(4, n_kv_heads=3)), "choose a divisor of 4"),
        (lambda: MambaConfig(inner_norm_eps=1e-6), "inner_norm_eps is 1e-06, but inner_norm is 'none'"),
        (lambda: ModelConfig("R", mamba=MambaConfig(proj_bias=True)), "the projections of R have no biases"),
        (lambda: ModelConfig(final_norm=False, final_norm_kind="layernorm"), "there is no norm before the head"),
        (lambda: ModelConfig(norm_eps=0.0), "norm_eps is 0.0; it must be greater than 0"),
        (lambda: ExpertsConfig(scores="max"), "scores is 'max'; expected one of 'softmax', 'sigmoid'"),
        (lambda: ExpertsConfig(4, top_k=5), "top_k is 5, more than n_experts = 4"),
        (lambda: ExpertsConfig(z_weight=-1.0), "z_weight is -1.0; it must be 0 or more"),
        (lambda: RoutedMambaConfig(()), "name one or more of conv, gate, out"),
        (
            lambda: RoutedMambaConfig(experts=ExpertsConfig(n_shared_experts=1)),
            "shared routing has linear experts only",
        ),
        (lambda: from_dict(ModelConfig, {"mamba": {"d_stat": 3}}), "config.mamba has the unknown key 'd_stat'"),
        (lambda: from_dict(ModelConfig, {"a" * 3000: 3}), f"unknown key '{'a' * 76}...; known keys are pattern"),
        (lambda: from_dict(ModelConfig, {"experts": 3}), "config.experts is 3; expected the fields of ExpertsConfig"),
    ],
)
def test_bad_values_are_named_with_what_would_work(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_counting_imports_no_torch():
    code = """
import sys, moemamba as mm
print(mm.count_parameters(mm.preset('moe-mamba-100m')))
assert 'torch' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "total=2439069696, active=117522432" in done.stdout
