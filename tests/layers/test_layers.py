"""Floor 2: each layer alone against an independent implementation with the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba.configuration_mamba import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from moemamba import layers
from moemamba.layers.linear import Linear, before_bias, beside, in_halves
from moemamba.layers.moe.routing import arrival, capacity


def assert_same_gradients(expected, actual):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"gradient of {name}: {m}")


def gradients(module, outputs):
    """By parameter name, of a fixed weighing of the outputs."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad((outputs * weights).sum(), parameters, allow_unused=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize(("d_model", "d_state", "d_conv", "expand"), [(24, 16, 4, 2), (17, 5, 3, 1)])
def test_mamba_is_transformers_mamba(d_model, d_state, d_conv, expand):
    theirs = MambaMixer(
        MambaConfig(hidden_size=d_model, state_size=d_state, conv_kernel=d_conv, expand=expand, num_hidden_layers=1), 0
    ).eval()
    ours = layers.Mamba(d_model, d_state, d_conv, expand)
    ours.load_state_dict(theirs.state_dict())  # the field's names and shapes, strictly
    x = torch.randn(2, 11, d_model)
    expected, (actual, _) = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected)
    expected_grads = gradients(theirs, expected)
    assert_same_gradients(expected_grads, gradients(ours, actual))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_halves_of_a_product(device):
    """As two products on a GPU; where the layer is no longer what it was, by calling it."""
    layer = Linear(24, 40, bias=False).to(device)
    x = torch.randn(2, 7, 24, device=device, requires_grad=True)
    for hooked in (False, True):
        if hooked:
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        expected, actual = layer(x).chunk(2, dim=-1), in_halves(layer, x)
        torch.testing.assert_close(actual, expected)
        weights = [torch.randn_like(half) for half in expected]
        wanted, found = (torch.autograd.grad(halves, (x, layer.weight), weights) for halves in (expected, actual))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_input_beside_a_product_and_product_before_its_bias(device):
    """Both are `layer(x)`, also where the layer is no longer what it was."""
    layer = Linear(24, 40).to(device)
    plain = Linear(24, 40, bias=False).to(device)
    x = torch.randn(2, 7, 24, device=device, requires_grad=True)
    for hooked in (False, True):
        if hooked:
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
            plain.register_forward_hook(lambda module, inputs, output: 2 * output)
        y, bias = before_bias(layer, x)
        assert (bias is None) == hooked
        torch.testing.assert_close(y if bias is None else y + bias, layer(x))
        other, y = beside(plain, x)
        torch.testing.assert_close((other, y), (x, plain(x)))
        weights = torch.randn_like(x), torch.randn_like(y)
        wanted, found = (torch.autograd.grad(pair, (x, plain.weight), weights) for pair in ((x, plain(x)), (other, y)))
        torch.testing.assert_close(found, wanted)


def test_mamba_starts_as_mamba_ssm_does():
    layer = layers.Mamba(256)
    dt = F.softplus(layer.dt_proj.bias)
    assert 1e-3 * 0.99 < dt.min() < 2e-3 and 5e-2 < dt.max() < 1e-1 * 1.01
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.25)  # log-uniform
    torch.testing.assert_close(layer.A_log.exp()[7], torch.arange(1.0, 17))
    assert layer.D.eq(1).all() and layer.dt_rank == 16 and layer.d_inner == 512


def slow_attention(layer, x):
    """One query at a time; rotary positions as a product of complex numbers."""
    b, l, d = x.shape  # noqa: E741
    heads, width = layer.n_heads, d // layer.n_heads
    q, k, v = (t.view(b, l, heads, width) for t in layer.qkv_proj(x).split(d, dim=-1))
    angle = torch.arange(l)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(t):
        pairs = torch.complex(t[..., : width // 2], t[..., width // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    q, k = rotate(q), rotate(k)
    out = torch.zeros_like(q)
    for row in range(b):
        for t in range(l):
            for head in range(heads):
                scores = k[row, : t + 1, head] @ q[row, t, head] / math.sqrt(width)
                out[row, t, head] = scores.softmax(0) @ v[row, : t + 1, head]
    return layer.out_proj(out.flatten(2))


def test_attention_is_a_loop_over_queries():
    layer = layers.Attention(16, 2)
    x = torch.randn(2, 7, 16)
    expected, (actual, _) = slow_attention(layer, x), layer(x)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(gradients(layer, expected), gradients(layer, actual))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda h: F.silu(h[: len(h) // 2]) * h[len(h) // 2 :],
}


def slow_moe(layer, x, seq_idx, limit, activation):
    """Every token of every time step asks every expert; an expert that is full drops whoever comes later."""
    b, l, _ = x.shape  # noqa: E741
    y, load, dropped = torch.zeros_like(x), [0] * layer.router.n_experts, 0
    act = ACTIVATIONS[activation]
    for t in range(l):
        for row in range(b):
            if seq_idx[row, t] < 0:
                continue
            p = (layer.router.weight @ x[row, t]).softmax(0)
            for e in (p + layer.router.balance_bias).argsort(descending=True)[: layer.router.top_k].tolist():
                load[e] += 1
                if load[e] > limit:
                    dropped += 1
                    continue
                hidden = act(layer.experts.up_proj[e] @ x[row, t])
                y[row, t] += p[e] * (layer.experts.down_proj[e] @ hidden)
            if layer.shared is not None:
                hidden = act(layer.shared.up_proj.weight @ x[row, t])
                y[row, t] += layer.shared.down_proj.weight @ hidden
    return y, load, dropped / max(sum(load), 1)


@pytest.mark.parametrize(
    ("top_k", "activation", "factor", "shared", "bias"),
    [
        (1, "relu", None, 0, False),
        (1, "relu", 1.0, 0, False),
        (2, "swiglu", 0.5, 1, False),
        (3, "gelu", None, 2, True),
        (2, "silu", 1.25, 0, True),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_moe_is_a_double_loop_over_tokens_and_experts(top_k, activation, factor, shared, bias, training):
    layer = layers.MoE(
        8, 5, 6, top_k=top_k, activation=activation, capacity_factor=factor, n_shared_experts=shared
    ).train(training)
    if bias:
        layer.router.balance_bias.copy_(torch.tensor([0.5, 0, 0, -0.3, 0.1]))
    x = torch.randn(3, 10, 8)
    seq_idx = torch.zeros(3, 10, dtype=torch.int32)
    seq_idx[0, :4] = -1
    seq_idx[2, 7:] = -1
    limit = math.floor(factor * 23 * top_k / 5) if factor and training else math.inf
    expected, load, dropped = slow_moe(layer, x, seq_idx, limit, activation)
    actual, stats = layer(x, seq_idx)
    torch.testing.assert_close(actual, expected)
    assert stats.load.tolist() == load and stats.dropped.item() == pytest.approx(dropped, abs=1e-6)
    assert (dropped > 0) == (factor is not None and training)
    assert_same_gradients(gradients(layer, expected), gradients(layer, actual))


def slow_routed_mamba(layer, x, projections):
    """Shared routing, top-1: token by token through the chosen expert's matrices, then the scan of a plain layer."""
    b, l, d = x.shape  # noqa: E741
    p = (x @ layer.router.weight.T).softmax(-1)
    chosen, gate = p.argmax(-1), p.amax(-1)

    def project(name, inputs):
        module = getattr(layer, f"{name}_proj")
        if name not in projections:
            return module(inputs)
        rows = [[module.weight[chosen[i, t]] @ inputs[i, t] for t in range(l)] for i in range(b)]
        return torch.stack([torch.stack(row) for row in rows])

    plain = layers.Mamba(d, layer.d_state)
    shared = dict(layer.named_parameters())
    u, z = project("conv", x), project("gate", x)
    identity = torch.eye(layer.d_inner)
    used = {name: shared[name] for name, _ in plain.named_parameters() if name in shared}
    used |= {"in_proj.weight": torch.cat([torch.eye(2 * layer.d_inner)]), "out_proj.weight": identity}
    inner = torch.func.functional_call(plain, used, (torch.cat([u, z], -1),))[0]
    return project("out", inner) * gate[..., None]


@pytest.mark.parametrize("projections", [("conv", "gate", "out"), ("gate",), ("conv", "out")])
def test_shared_routing_is_a_loop_over_tokens(projections):
    layer = layers.RoutedMamba(8, 3, projections)
    x = torch.randn(2, 6, 8)
    expected = slow_routed_mamba(layer, x, projections)
    actual, _, stats = layer(x)
    torch.testing.assert_close(actual, expected)
    assert len(stats) == 1 and stats[0].load.sum() == 12
    assert_same_gradients(gradients(layer, expected), gradients(layer, actual))


@pytest.mark.parametrize(
    "projections",
    [("conv",), ("gate",), ("out",), ("conv", "gate"), ("conv", "out"), ("gate", "out"), ("conv", "gate", "out")],
)
def test_independent_routing_replaces_exactly_the_projections_that_it_names(projections):
    """The paper's seven placements: with one expert, each equals a Mamba layer around that expert's feed-forward."""
    layer = layers.RoutedMamba(8, 1, projections, shared_routing=False, d_expert=5, activation="relu")
    plain = layers.Mamba(8)
    plain.load_state_dict(
        {**plain.state_dict(), **{k: v for k, v in layer.state_dict().items() if k in plain.state_dict()}}
    )

    def project(name, inputs):
        module = getattr(layer, f"{name}_proj")
        if name not in projections:
            return module(inputs)
        return F.relu(inputs @ module.experts.up_proj[0].T) @ module.experts.down_proj[0].T

    x = torch.randn(2, 6, 8)
    y, _ = plain.scan(project("conv", x), project("gate", x), None, None)
    actual, _, stats = layer(x)
    torch.testing.assert_close(actual, project("out", y))
    assert len(stats) == len(projections)


def test_capacity_is_the_papers_formula():
    for factor, tokens, top_k, experts in [(1.0, 65_536, 1, 42), (1.25, 100, 2, 8), (1.0, 7, 1, 8), (0.7, 10, 1, 7)]:
        expected = math.floor(factor * tokens * top_k / experts)
        assert capacity(factor, torch.tensor(tokens, dtype=torch.float64), top_k, experts) == expected


def test_places_in_a_queue_go_by_time_then_row():
    chosen = torch.tensor([[[0], [1], [0]], [[0], [0], [2]]])  # (b, l, k); 2 marks no choice
    assert arrival(chosen, 2).squeeze(-1).tolist() == [[0, 0, 3], [1, 2, 0]]


def test_router_losses():
    """Balance is 1 when even and n_experts when all go to one; both losses are those of their definitions."""
    router = layers.Router(4, 3)
    x = torch.randn(2, 6, 4)
    stats = router(x).stats
    logits = x.flatten(0, 1) @ router.weight.T
    p = logits.softmax(-1)
    f = F.one_hot(p.argmax(-1), 3).float().mean(0)
    torch.testing.assert_close(stats.balance_loss, 3 * (f * p.mean(0)).sum())
    torch.testing.assert_close(stats.z_loss, logits.exp().sum(-1).log().square().mean())
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1).mean())
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[100.0, 0, 0, 0], [0] * 4, [0] * 4]))
    assert router(torch.ones(1, 5, 4)).stats.balance_loss.item() == pytest.approx(3)


def test_balance_bias_evens_the_load_without_touching_the_gates():
    router = layers.Router(8, 4)
    x = torch.randn(4, 32, 8) + 1
    before = router(x)
    for _ in range(300):
        router.update_balance_bias(router(x).stats.load, 0.01)
    after = router(x)
    assert after.stats.load.std() < before.stats.load.std() / 3
    probabilities = (x.flatten(0, 1) @ router.weight.T).softmax(-1)
    torch.testing.assert_close(after.gates, probabilities.gather(1, after.indices))


def test_router_stays_in_float32_under_autocast():
    """bfloat16 logits would choose other experts; ours do not change."""
    torch.manual_seed(0)
    router = layers.Router(64, 32)
    x = torch.randn(4, 64, 64)
    exact = router(x).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router(x).indices.equal(exact)
        rounded = (x.flatten(0, 1) @ router.weight.T).argmax(-1, keepdim=True)
    assert not rounded.equal(exact)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.FeedForward(16, 32, "tanh"), "activation is 'tanh'; known are relu, gelu, silu, swiglu"),
        (lambda: layers.Attention(16, 3), "n_heads is 3, but d_model = 16 must split into heads of even width"),
        (lambda: layers.Attention(6, 2), "n_heads is 2, but d_model = 6 must split into heads of even width"),
        (lambda: layers.MoE(16, 2, top_k=3)(torch.zeros(1, 3, 16)), "top_k is 3; of 2 experts"),
        (lambda: layers.MoE(16, 2)(torch.zeros(16)), r"x has shape \(16,\); expected \(b, l, d\)"),
        (lambda: layers.Attention(16, 2)(torch.zeros(3, 16)), r"x has shape \(3, 16\); expected \(b, l, d\)"),
        (lambda: layers.Mamba(16)(torch.zeros(3, 16)), r"x has shape \(3, 32\); expected \(b, l, i\)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
