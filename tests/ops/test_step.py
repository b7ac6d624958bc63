"""Generation on the CPU: a position of a Mamba layer in one kernel and products of few rows, against plain PyTorch."""

import sys

import pytest
import torch
from doors import cpu, reference
from torch import Tensor, nn

from moemamba import ModelConfig, MoEMamba, ops
from moemamba.layers import Mamba, mamba
from moemamba.layers.linear import Linear
from moemamba.ops.kit.cpu import product as cpu_linear


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` is filled with NaN, so that whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_and_input(batch=1, d_model=40, d_state=16, d_conv=4, expand=2.0, dt_rank=None):
    torch.manual_seed(0)
    layer = Mamba(d_model, d_state, d_conv, expand, dt_rank)
    return layer, torch.randn(batch, 7, d_model)


def count_steps(monkeypatch):
    """A list that grows with each call of the kernel."""
    calls = []
    plain = ops.mamba_step
    monkeypatch.setattr(mamba.ops, "mamba_step", lambda *args: calls.append(1) or plain(*args))
    return calls


def last_by_step(layer, x):
    """The last position of x after the others, and the state."""
    _, state = layer(x[:, :-1])
    return layer(x[:, -1:], state)


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"d_model": 33, "d_state": 5, "expand": 1.5},
        {"d_state": 37, "dt_rank": 1},
        {"d_conv": 1},
        {"d_conv": 2, "d_state": 1},
        {"d_model": 256},
    ],
    ids=str,
)
def test_one_kernel_equals_the_ops(shape, batch, monkeypatch):
    layer, x = layer_and_input(batch, **shape)
    calls = count_steps(monkeypatch)
    with torch.no_grad():
        y, state = last_by_step(layer, x)
        assert len(calls) == 1
        whole, after = layer(x)
        with ops.backend("reference"):
            expected, expected_state = last_by_step(layer, x)
    assert len(calls) == 1
    for actual in ((y, *state), (whole[:, -1:], *after)):
        for value, wanted in zip(actual, (expected, *expected_state), strict=True):
            assert value.dtype == wanted.dtype and value.shape == wanted.shape
            torch.testing.assert_close(value, wanted, atol=2e-5, rtol=2e-5)


def test_reference_is_the_layer():
    """`reference.mamba_step`, which says what the op means, against the layer's own forward pass."""
    layer, x = layer_and_input(batch=2)
    layer = layer.double()
    y, state = last_by_step(layer, x.double())
    _, before = layer(x[:, :-1].double())
    found = ops.mamba_step(x[:, -1:].double(), *before, *layer._step_weights())
    for actual, expected in zip(found, (y, *state), strict=True):
        torch.testing.assert_close(actual, expected)


def lora(layer):
    layer.x_proj = nn.Sequential(layer.x_proj)


def hooked(layer):
    layer.in_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_before(layer):
    layer.out_proj.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer.dt_proj)


def another_forward(layer):
    layer.conv1d.forward = lambda x, state=None, seq_idx=None: ops.causal_conv1d(
        x, layer.conv1d.weight.squeeze(1), None, initial_state=state, seq_idx=seq_idx
    )


def with_bias(layer):
    layer.in_proj.bias = nn.Parameter(torch.randn(layer.in_proj.out_features))


@pytest.mark.parametrize("change", [lora, hooked, hooked_before, parametrised, another_forward, with_bias])
def test_changed_children_are_called(change, monkeypatch):
    layer, x = layer_and_input()
    change(layer)
    calls = count_steps(monkeypatch)
    with torch.no_grad():
        y, state = last_by_step(layer, x)
        expected, after = layer(x)
    assert not calls
    torch.testing.assert_close(y, expected[:, -1:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(tuple(state), tuple(after), atol=2e-5, rtol=2e-5)


def test_where_the_kernel_does_not_apply(monkeypatch):
    """Gradients, packing, other dtypes: the ops one by one, with the same numbers."""
    layer, x = layer_and_input()
    calls = count_steps(monkeypatch)
    y, _ = last_by_step(layer, x)
    assert y.requires_grad
    with torch.no_grad():
        _, state = layer(x[:, :-1])
        for sequence in (0, -1):
            seq_idx = torch.full((1, 1), sequence)
            packed, after = layer(x[:, -1:], state, seq_idx)
            torch.testing.assert_close(packed, y if sequence == 0 else torch.zeros_like(y), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(tuple(after), tuple(state))
        assert not calls
        half = layer.bfloat16()
        y, state = last_by_step(half, x.bfloat16())
        whole, _ = half(x.bfloat16())
        torch.testing.assert_close(y, whole[:, -1:], atol=2e-2, rtol=2e-2)
    assert not calls and y.dtype == torch.bfloat16


def test_weights_that_do_not_lie_as_the_kernel_reads_them():
    layer, x = layer_and_input()
    with torch.no_grad():
        _, before = layer(x[:, :-1])
        expected = last_by_step(layer, x)[0]
        weights = list(layer._step_weights())
        weights[0] = weights[0].T.contiguous().T
        y, *_ = ops.mamba_step(x[:, -1:], *before, *weights)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=2e-5)
        with pytest.raises(ValueError, match="x_proj has shape"):
            ops.mamba_step(x[:, -1:], *before, *weights[:3], weights[0], *weights[4:])


@pytest.mark.parametrize("threads", [1, 2])
def test_in_place_and_prepared_are_the_same(threads, monkeypatch):
    """Over one thread or several, where states lie by channel and where they do not, after weights have changed."""
    monkeypatch.setattr(sys.modules["moemamba.ops.mamba_step.cpu"], "WORTH_THREADS", 1)
    monkeypatch.setattr(sys.modules["moemamba.ops.kit.cpu.run"], "WORTH_THREADS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer, x = layer_and_input(5, d_model=72)
    layer.requires_grad_(False)
    _, state = layer(x[:, :-1])
    conv, ssm = (tensor.clone() for tensor in state)
    rows, y = x[:, -1].contiguous(), torch.ones(5, 72)
    prepared = ops.prepare_mamba_step(rows, conv, ssm, layer._step_weights(), y)
    layer.A_log += 0.25  # which is read anew
    expected, *after = ops.mamba_step(x[:, -1:], *state, *layer._step_weights())
    prepared(3)
    assert torch.equal(y[:3], 1 + expected[:3, 0]) and torch.equal(y[3:], torch.ones(2, 72))
    for new, old, wanted in zip((conv, ssm), state, after, strict=True):
        assert torch.equal(new[:3], wanted[:3]) and torch.equal(new[3:], old[3:])
    for arrange in (Tensor.clone, Tensor.contiguous):
        own = [arrange(tensor) for tensor in state]
        found, *states = ops.mamba_step(x[:, -1:], *own, *layer._step_weights(), in_place=True)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(own, states, strict=True))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    torch.set_num_threads(before)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("inner", ["none", "rmsnorm", "weightless"])
@pytest.mark.parametrize(("rows", "spare"), [(1, 0), (3, 1), (2, 3)])
def test_weights_prepared_alone(rows, spare, inner, normed):
    """Other inputs and states each time, a longer window, the norm and the sum with it, and weights that change."""
    torch.manual_seed(0)
    layer = Mamba(40, 5, inner_norm=inner).requires_grad_(False)
    scale, x = torch.randn(40), torch.randn(rows, 9, 40)
    with torch.no_grad():
        weights = layer._step_weights()
        step = ops.mamba_step_of(weights, 3 + spare, (scale, 1e-3) if normed else None)
        _, state = layer(x[:, :4])
        window = torch.randn(rows, 3 + spare, 80).transpose(1, 2)
        window[..., spare:] = state.conv
        own, ssm = window[..., spare:], state.ssm.transpose(1, 2).contiguous().transpose(1, 2)
        conv, expected_ssm = own.clone(), ssm.clone()
        for position in range(4, 9):
            layer.A_log.data += 0.2  # which leaves no trace in the tensor's version
            layer.conv1d.weight[:, 0, position % 4] *= 2
            now = x[:, position : position + 1].contiguous()
            with ops.backend("reference"):
                norm = (scale, None) if normed else (None, None)
                y, conv, expected_ssm = ops.mamba_step(now, conv, expected_ssm, *weights, *norm, eps=1e-3)
            found = step(now, *(state.transpose(1, 2) for state in (window, ssm)))
            for value, wanted in ((found, y), (own, conv), (ssm, expected_ssm)):
                torch.testing.assert_close(value, wanted, atol=2e-5, rtol=2e-5)
        assert step(now.double(), window.transpose(1, 2), ssm.transpose(1, 2)) is None
        with pytest.raises(ValueError, match="conv_state has shape"):
            step(now, window[..., 1:].transpose(1, 2), ssm.transpose(1, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_linear(rows, bias, monkeypatch):
    monkeypatch.setattr(cpu_linear, "MULTIPLICATIONS", 1e-4)  # as if it were worth two threads
    torch.manual_seed(0)
    layer = Linear(37, 61, bias=bias)
    wide = torch.randn(rows, 1, 74)
    with torch.no_grad():
        for x in (wide[..., :37], wide[..., 37:].contiguous()):
            expected = reference.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(cpu.linear(x, layer.weight, layer.bias), expected)
            torch.testing.assert_close(layer(x), expected)
        assert cpu.linear(
            x.bfloat16(), *(None if p is None else p.bfloat16() for p in (layer.weight, layer.bias))
        ).dtype
    assert layer(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16


def test_a_compiled_model_decodes():
    """torch.compile sees the ops, and gives what the kernel gives."""
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig("M", n_blocks=1, d_model=24, vocab_size=11)).eval()
    tokens = torch.randint(0, 11, (1, 5))
    with torch.no_grad():
        state = model(tokens).state
        expected = model(tokens[:, :1], state)
        model.compile_layers(backend="eager", fullgraph=True)
        actual = model(tokens[:, :1], state)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.state.mixers, expected.state.mixers)
