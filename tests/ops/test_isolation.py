"""Law 1: what is not of a sequence never reaches it, NaN and infinity included, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ops
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig, RoutedMambaConfig
from moemamba.layers import LAYERS
from moemamba.model import MoEMamba

BACKENDS = ["reference", "cpu"]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or bool(ops.why_not("triton", "cpu")), reason="needs an interpreter"
)
STRANGE = [math.nan, math.inf, -math.inf]
CONFIG = ModelConfig(
    d_model=16,
    vocab_size=31,
    experts=ExpertsConfig(4, top_k=2, n_shared_experts=1),
    attention=AttentionConfig(2),
    feedforward=FeedForwardConfig(bias=True),
)
MIXERS = {
    "M": CONFIG,
    "A": CONFIG,
    "E": CONFIG,
    "R shared": CONFIG,
    "R independent": CONFIG.replace(routed=RoutedMambaConfig(routing="independent", experts=ExpertsConfig(3))),
}
ROWS = {  # sequence of each position; what is looked at is sequence 5
    "padding before": [-1, -1, -1, 5, 5, 5, 5, 5],
    "padding inside": [5, 5, -1, 5, 5, -1, -1, 5],
    "padding behind": [5, 5, 5, 5, 5, -1, -1, -1],
    "another before": [1, 1, 1, 5, 5, 5, 5, 5],
    "another behind": [5, 5, 5, 5, 5, 7, 7, 7],
    "between two": [1, 1, -1, 5, 5, 5, 8, 8],
}


def spoil(tensor, ids, value):
    """With `value` in some entries of every position (dimension 1) that is not of sequence 5."""
    spoilt = tensor.clone()
    spoilt[:, torch.tensor(ids) != 5, ::2] = value
    return spoilt


def scan_inputs(length, width=5, n=3):
    shapes = {"u": width, "dt": width, "B": n, "C": n, "z": width}
    return {name: torch.randn(2, length, size) for name, size in shapes.items()}


def scan(streams, parameters, ids):
    seq_idx = torch.tensor([ids] * 2, device=streams["u"].device)
    return ops.selective_scan(
        streams["u"], streams["dt"], parameters["A"], streams["B"], streams["C"], parameters["D"], streams["z"],
        parameters["dt_bias"], seq_idx=seq_idx,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    ids=st.sampled_from(list(ROWS.values())),
    where=st.sampled_from(["u", "dt", "B", "C", "z"]),
    value=st.sampled_from(STRANGE),
    stretch=st.sampled_from([1, 5]),
)
def test_scan(backend, ids, where, value, stretch):
    check_scan(backend, "cpu", [i for i in ids for _ in range(stretch)], where, value)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("where", ["u", "dt", "B", "C", "z"])
@pytest.mark.parametrize("ids", [ROWS["between two"], ROWS["padding before"]])
def test_scan_in_the_interpreter(ids, where):
    check_scan("triton", "cpu", ids, where, math.nan)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("where", ["u", "dt", "B", "C", "z"])
@pytest.mark.parametrize("ids", ROWS.values())
@pytest.mark.parametrize("stretch", [1, 40])
def test_scan_on_a_gpu(ids, where, backend, stretch):
    check_scan(backend, "cuda", [i for i in ids for _ in range(stretch)], where, math.nan)


def check_scan(backend, device, ids, where, value):
    torch.manual_seed(0)
    own = torch.tensor(ids) == 5
    parameters = {"A": -torch.rand(5, 3), "D": torch.randn(5), "dt_bias": torch.randn(5)}
    clean = scan_inputs(len(ids))
    found = []
    for streams in (clean, clean | {where: spoil(clean[where], ids, value)}):
        leaves = {name: t.to(device, copy=True).requires_grad_() for name, t in streams.items()}
        shared = {name: t.to(device, copy=True).requires_grad_() for name, t in parameters.items()}
        with ops.backend(backend):
            y, final = scan(leaves, shared, ids)
            loss = y[:, own].square().sum() + (final.square().sum() if ids[-1] in (5, -1) and 7 not in ids else 0)
            if 8 in ids:
                loss = y[:, own].square().sum()
            loss.backward()
        gradients = [t.grad[:, own] for t in leaves.values()]
        if not {1, 7, 8} & set(ids):  # padding has no part in the parameters' gradients either
            gradients += [t.grad for t in shared.values()] + [t.grad[:, ~own] for t in leaves.values()]
        found.append([y[:, own], *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(ids=st.sampled_from(list(ROWS.values())), value=st.sampled_from(STRANGE), taps=st.integers(1, 4))
def test_convolution(backend, ids, value, taps):
    torch.manual_seed(0)
    own = torch.tensor(ids) == 5
    clean, weight, bias = torch.randn(2, 8, 5), torch.randn(5, taps), torch.randn(5)
    found = []
    for x in (clean, spoil(clean, ids, value)):
        x, w, b = (t.clone().requires_grad_() for t in (x, weight, bias))
        with ops.backend(backend):
            y, _ = ops.causal_conv1d(x, w, b, seq_idx=torch.tensor([ids] * 2))
            y[:, own].square().sum().backward()
        parameters = [] if {1, 7, 8} & set(ids) else [w.grad, b.grad]
        found.append([y[:, own], x.grad[:, own], *parameters])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(deadline=None, derandomize=True, max_examples=20)
@given(value=st.sampled_from(STRANGE), reduction=st.sampled_from(["mean", "sum"]), seed=st.integers(0, 5))
def test_loss_of_what_does_not_count(backend, value, reduction, seed):
    torch.manual_seed(seed)
    hidden, weight, targets = torch.randn(12, 8), torch.randn(11, 8), torch.randint(0, 11, (12,))
    targets[::3] = -100
    found = []
    for strange in (False, True):
        h, w = hidden.clone(), weight.clone().requires_grad_()
        if strange:
            h[::3, seed:] = value
        h.requires_grad_()
        with ops.backend(backend):
            loss = ops.linear_cross_entropy(h, w, targets, reduction=reduction)
            loss.backward()
        found.append([loss, h.grad, w.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", STRANGE)
def test_router_does_not_count_padding(backend, value):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(12, 8), torch.randn(4, 8), torch.zeros(4)
    valid = (torch.arange(12) % 3 > 0).float()
    found = []
    for strange in (False, True):
        x_, w = x.clone(), weight.clone().requires_grad_()
        if strange:
            x_[::3] = value
        x_.requires_grad_()
        with ops.backend(backend):
            indices, gates, *totals = ops.router(x_, w, bias, 2, valid)
            (gates.square().sum() + sum(t.square().sum() for t in totals[1:3])).backward()
        found.append([indices, gates, *totals, x_.grad, w.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)


def layer_of(name, seed=0):
    torch.manual_seed(seed)
    layer = LAYERS[name[0]].build(MIXERS[name])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MIXERS)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(ids=st.sampled_from(list(ROWS.values())), value=st.sampled_from(STRANGE), training=st.booleans())
def test_layers(name, backend, ids, value, training):
    layer, own = layer_of(name).train(training), torch.tensor(ids) == 5
    clean, seq_idx = torch.randn(2, 8, 16), torch.tensor([ids] * 2)
    found = []
    for x in (clean, spoil(clean, ids, value)):
        x = x.clone().requires_grad_()
        layer.zero_grad()
        with ops.backend(backend):
            y, *_ = layer(x, seq_idx=seq_idx)
            y[:, own].square().sum().backward()
        parameters = [] if {1, 7, 8} & set(ids) else [p.grad for p in layer.parameters() if p.grad is not None]
        found.append([y[:, own], x.grad[:, own], *parameters])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [name for name in MIXERS if name[0] != "E"])
@pytest.mark.parametrize("value", STRANGE)
def test_states_of_neighbours(name, backend, value):
    """A sequence that goes on from a state does not see what stood before it in its row."""
    layer, ids = layer_of(name).eval(), [1, 1, -1, 5, 5, 5]
    clean, rest, seq_idx = torch.randn(2, 6, 16), torch.randn(2, 3, 16), torch.tensor([ids] * 2)
    found = []
    with torch.no_grad(), ops.backend(backend):
        for x in (clean, spoil(clean, ids, value)):
            _, state, *_ = layer(x, seq_idx=seq_idx)
            parts = [layer(rest, state)[0], layer(rest, state, seq_idx=torch.tensor([[5, 5, 5]] * 2))[0]]
            for t in range(3):  # and one at a time
                y, state, *_ = layer(rest[:, t : t + 1], state)
                parts.append(y)
            found.append(parts)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MIXERS if name[0] != "E"])
@pytest.mark.parametrize("value", STRANGE)
def test_what_comes_later_reaches_nothing_earlier(name, value):
    """And what is of the sequence does reach what follows."""
    layer, x = layer_of(name).eval(), torch.randn(2, 8, 16)
    spoilt = x.clone()
    spoilt[:, 5] = value
    with torch.no_grad():
        want, got = layer(x)[0], layer(spoilt)[0]
        first, state, *_ = layer(spoilt[:, :6])
        rest = layer(spoilt[:, 6:], state)[0]
    torch.testing.assert_close(got[:, :5], want[:, :5])
    assert got[:, 5:].isfinite().logical_not().any(-1).all()
    assert torch.cat([first, rest], 1)[:, 5:].isfinite().logical_not().any(-1).all()


@pytest.mark.parametrize("pattern", ["M", "E", "F", "A", "R", "ME(MA)FR"])
def test_a_token_whose_vector_is_not_a_number(pattern):
    """In a model: as padding it changes nothing, in another sequence only what is shared."""
    torch.manual_seed(0)
    model = MoEMamba(CONFIG.replace(pattern=pattern, n_blocks=1))
    tokens = torch.randint(0, 30, (2, 8))
    for ids in ROWS.values():
        own, found = torch.tensor(ids) == 5, []
        for value in (0.0, math.nan):
            with torch.no_grad():
                model.embedding.weight[30] = value
            given = tokens.masked_fill(~own, 30)
            targets = tokens.roll(-1, 1).masked_fill(~own, -100)
            model.zero_grad()
            out = model(given, seq_idx=torch.tensor([ids] * 2), targets=targets)
            (out.loss + 0 * out.auxiliary).backward()
            alone = not {1, 7, 8} & set(ids)
            found.append([out.loss, *([p.grad for p in model.parameters()] if alone else [])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
