"""What published models have and ours have on request: inner norms, fewer key heads, sigmoid gates, biases."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_layers import assert_same_gradients, gradients
from transformers import FalconMambaConfig, JambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaAttention, JambaMambaMixer

from moemamba import ModelConfig, MoEMamba, layers, ops
from moemamba.config import ExpertsConfig, MambaConfig
from moemamba.ops.choice import OPS, unsupported

D = 24
NORMS = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}


def ours_named(values):
    """By our names, of a dictionary by transformers' names."""
    return {".".join(NORMS.get(part, part) for part in name.split(".")): value for name, value in values.items()}


def jamba(**changes):
    sizes = {"mamba_d_state": 5, "mamba_dt_rank": 3, "mamba_expand": 2, "rms_norm_eps": 1e-3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 8}
    return JambaConfig(hidden_size=D, attn_implementation="eager", **sizes, **heads, **changes)


@pytest.mark.parametrize(("conv_bias", "proj_bias"), [(True, False), (False, True)])
def test_inner_norms_are_jambas(conv_bias, proj_bias):
    theirs = JambaMambaMixer(jamba(mamba_conv_bias=conv_bias, mamba_proj_bias=proj_bias), 0).eval()
    theirs.A_log.data = theirs.A_log.data.float()
    for norm in NORMS:
        torch.nn.init.normal_(getattr(theirs, norm).weight)
    options = {"inner_norm_eps": 1e-3, "conv_bias": conv_bias, "proj_bias": proj_bias}
    ours = layers.Mamba(D, 5, dt_rank=3, inner_norm="rmsnorm", **options)
    ours.load_state_dict(ours_named(theirs.state_dict()))  # strictly
    check(theirs, ours)


def test_inner_norms_without_weights_are_falcon_mambas():
    sizes = {"state_size": 5, "time_step_rank": 3, "expand": 2, "intermediate_size": 2 * D}
    config = FalconMambaConfig(hidden_size=D, num_hidden_layers=1, mixer_rms_eps=1e-3, use_bias=False, **sizes)
    theirs = FalconMambaMixer(config, 0, initialize_mixer_weights=False)
    ours = layers.Mamba(D, 5, dt_rank=3, inner_norm="weightless", inner_norm_eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(ours_named(theirs.eval().state_dict()))
    check(theirs, ours)


def check(theirs, ours):
    x = torch.randn(2, 11, D)
    expected, (actual, _) = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(ours_named(gradients(theirs, expected)), gradients(ours, actual))
    with torch.no_grad():  # by steps, which a kernel takes over where it knows all of the layer
        assert (ours.weights_of_step(x[:, :1]) is None) == (ours.proj_bias or not ours.conv_bias)
        y, state = ours(x[:, :6])
        for t in range(6, 11):
            y, state = ours(x[:, t : t + 1], state)
            torch.testing.assert_close(y, expected[:, t : t + 1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"conv_bias": False}, "conv_bias"),
        ({"proj_bias": True}, "proj_bias"),
        ({"inner_norm": "rmsnorm"}, None),
        ({}, None),
    ],
)
def test_a_step_that_is_not_fused_says_why(options, reason):
    found = layers.Mamba(D, **options).why_not_fused()
    assert found is None if reason is None else reason in found


def test_attention_without_positions_and_with_fewer_keys_is_jambas():
    theirs = JambaAttention(jamba(), 4).eval()
    ours = layers.Attention(D, 6, n_kv_heads=2, rotary=False)
    weights = theirs.state_dict()
    qkv = torch.cat([weights[f"{name}_proj.weight"] for name in "qkv"])
    ours.load_state_dict({"qkv_proj.weight": qkv, "out_proj.weight": weights["o_proj.weight"]})
    x = torch.randn(2, 11, D)
    hidden = torch.full((11, 11), -math.inf).triu(1)[None, None]
    expected, (actual, state) = theirs(x, attention_mask=hidden)[0], ours(x)
    torch.testing.assert_close(actual, expected)
    assert state.keys.shape == (2, 2, 11, 4)
    theirs_by_name = gradients(theirs, expected)
    expected = {"qkv_proj.weight": torch.cat([theirs_by_name[f"{name}_proj.weight"] for name in "qkv"])}
    assert_same_gradients(expected, gradients(ours, actual))


def test_attention_biases():
    layer = layers.Attention(8, 2, rotary=False, qkv_bias=True, out_bias=True)
    q, k, v = (F.linear(x := torch.randn(1, 5, 8), layer.qkv_proj.weight, layer.qkv_proj.bias)).chunk(3, -1)
    q, k, v = (each.view(1, 5, 2, 4).transpose(1, 2) for each in (q, k, v))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x)[0], F.linear(y, layer.out_proj.weight, layer.out_proj.bias))


ACTIVATIONS = {
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "gelu_erf": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "geglu": lambda x: (a := x.chunk(2, -1))[0] * (1 + torch.erf(a[0] / math.sqrt(2))) / 2 * a[1],
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mixture_with_sigmoid_gates_and_biases_is_a_loop(activation):
    """As in BlackMamba, where each token goes to one expert, and more generally."""
    torch.manual_seed(0)
    options = {"scores": "sigmoid", "router_bias": True, "bias": True, "n_shared_experts": 1}
    moe = layers.MoE(D, 5, 7, top_k=2, activation=activation, **options)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    moe.router.balance_bias.normal_(std=0.3)
    x = torch.randn(2, 9, D)
    router, experts, act = moe.router, moe.experts, ACTIVATIONS[activation]
    gates = (x.flatten(0, 1) @ router.weight.T + router.bias).sigmoid()
    chosen = (gates + router.balance_bias).argsort(-1, descending=True)[:, :2]
    expected = []
    for token, row in enumerate(x.flatten(0, 1)):
        y = moe.shared.down_proj(act(moe.shared.up_proj(row)))
        for e in chosen[token].tolist():
            hidden = act(experts.up_proj[e] @ row + experts.up_bias[e])
            y = y + gates[token, e] * (experts.down_proj[e] @ hidden + experts.down_bias[e])
        expected.append(y)
    expected = torch.stack(expected).view(2, 9, D)
    actual, stats = moe(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(moe, expected), gradients(moe, actual))
    load = F.one_hot(chosen, 5).sum((0, 1)).float()
    shares = gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(stats.load, load)
    torch.testing.assert_close(stats.balance_loss, 5 * (load / load.sum() * shares.mean(0)).sum())
    torch.testing.assert_close(stats.entropy, -(shares * shares.log()).sum(-1).mean())
    with torch.no_grad():
        torch.testing.assert_close(moe.eval().step(x[:, :1], None, 2, torch.zeros(2)), expected[:, :1])


def test_eps_and_the_kind_of_the_last_norm():
    model = MoEMamba(ModelConfig("M", 1, 8, norm_eps=0.5, final_norm_kind="layernorm"))
    assert isinstance(model.norm, torch.nn.LayerNorm) and model.norm.eps == 0.5
    x = torch.randn(3, 8)
    torch.testing.assert_close(model.layers[0].norm(x), x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt())
    inner = MoEMamba(ModelConfig("M", 1, 8, norm_eps=0.5, mamba=MambaConfig(inner_norm="weightless")))
    assert inner.layers[0].branches[0].B_norm.eps == 0.5


def test_what_kernels_do_not_know_is_the_references():
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.zeros(4)
    with ops.backend("reference"):
        expected = ops.router_means(x, weight, bias, 2, logit_bias=torch.ones(4), scores="sigmoid")
    torch.testing.assert_close(
        ops.router_means(x, weight, bias, 2, logit_bias=torch.ones(4), scores="sigmoid"), expected
    )
    triton = OPS["expert_feedforward"].doors["triton"]
    experts = (x, None, None, weight, weight, "relu2")
    assert unsupported(triton, experts) == "its kernels know no relu2" and unsupported(triton, experts[:5]) is None
    assert "biases" in unsupported(triton, (*experts[:5], "relu", bias, None))
    with pytest.raises(ValueError, match='scores is \'tanh\'; a router knows "softmax" and "sigmoid"'):
        ops.router(x, weight, bias, 2, scores="tanh")


def test_biased_experts_train_with_a_capacity():
    """Dropped choices get nothing, of a bias neither."""
    config = ExpertsConfig(4, capacity_factor=0.5, bias=True)
    model = MoEMamba(ModelConfig("E", 1, 8, experts=config)).train()
    model.layers[0].branches[0].experts.down_bias.data.fill_(1e3)
    record = []
    x = torch.randint(0, 257, (2, 6))
    hidden, _, _ = model.backbone(x, record=record)
    dropped = (record[0].indices == 4).all(-1)
    assert dropped.any()
    torch.testing.assert_close(hidden[dropped], model.norm(model.embedding(x))[dropped])
