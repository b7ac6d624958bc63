"""Layers take `device` and `dtype` as torch's own modules do."""

import inspect

import pytest
import torch

from moemamba import layers
from moemamba.layers import placing

D = 16
KINDS = {
    "Mamba": lambda **how: layers.Mamba(D, **how),
    "Mamba with norms": lambda **how: layers.Mamba(D, inner_norm="rmsnorm", proj_bias=True, **how),
    "MoE": lambda **how: layers.MoE(D, 4, top_k=2, n_shared_experts=1, bias=True, router_bias=True, **how),
    "Attention": lambda **how: layers.Attention(D, 2, qkv_bias=True, **how),
    "FeedForward": lambda **how: layers.FeedForward(D, 24, "gelu", bias=True, **how),
    "RoutedMamba": lambda **how: layers.RoutedMamba(D, 4, **how),
    "RoutedMamba, independent": lambda **how: layers.RoutedMamba(D, 3, ("gate",), False, d_expert=8, **how),
    "PooledHead": lambda **how: layers.PooledHead(D, 3, **how),
}


@pytest.fixture(params=KINDS, ids=KINDS)
def make(request):
    def make(**how):
        torch.manual_seed(0)
        return KINDS[request.param](**how)

    return make


def output(layer, x):
    made = layer(x)
    return made[0] if isinstance(made, tuple) else made


def test_every_public_layer_takes_them():
    public = {*layers.LAYERS.values(), layers.PooledHead}
    assert {type(make()) for make in KINDS.values()} == public
    assert all({"device", "dtype"} <= inspect.signature(kind).parameters.keys() for kind in public)


def test_a_device_holds_all_of_it(make):
    there = make(device="meta")
    everything = [*there.parameters(), *there.buffers()]
    assert all(tensor.is_meta for tensor in everything)
    here, usual = make(device="cpu"), make()
    assert all(torch.equal(*pair) for pair in zip(here.parameters(), usual.parameters(), strict=True))
    there.to_empty(device="cpu").load_state_dict(usual.state_dict())
    x = torch.randn(2, 7, D)
    assert torch.equal(output(there, x), output(usual, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_a_dtype_but_for_what_stays_float32(make, dtype):
    layer, wide = make(dtype=dtype), torch.promote_types(dtype, torch.float32)
    role = layers.roles(layer)
    assert {p.dtype for name, p in layer.named_parameters() if not role[name].float32} == {dtype}
    assert all(p.dtype == wide for name, p in layer.named_parameters() if role[name].float32)
    assert all(p.dtype == wide for name, p in layer.named_parameters() if "router" in name or "dt_" in name)
    assert all(buffer.dtype == wide for buffer in layer.buffers())
    x = torch.randn(2, 7, D)
    y = output(layer, x.to(dtype))
    assert y.dtype == dtype
    exact = output(make().double(), x.to(dtype).double()).detach()
    torch.testing.assert_close(y.double(), exact, atol=8 * torch.finfo(dtype).eps * exact.abs().max().item(), rtol=0)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters() if p.requires_grad)


def test_a_state_goes_on_in_the_dtype():
    layer = layers.Mamba(D, dtype=torch.bfloat16)
    x = torch.randn(2, 9, D, dtype=torch.bfloat16)
    whole, _ = layer(x)
    start = layer.initial_state(2)
    first, state = layer(x[:, :4], start)
    rest, after = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=0.02, rtol=0.02)
    assert (after.conv.dtype, after.ssm.dtype) == (torch.bfloat16, torch.float32)
    with torch.no_grad():
        one, _ = layer(x[:, :1], start)
    torch.testing.assert_close(one, whole[:, :1], atol=0.02, rtol=0.02)


def test_whole_numbers_stay_what_they_are():
    class Table(layers.BaseRouter):
        def __init__(self):
            super().__init__(4)
            self.register_buffer("table", torch.arange(7) % 4)
            self.register_buffer("bias", torch.zeros(4))
            self.register_buffer("on", torch.tensor(True))

        def forward(self, x, seq_idx=None):
            indices = self.table[: x.shape[1]].expand(len(x), -1)[..., None]
            return self.routed(indices, torch.ones(indices.shape), seq_idx)

    layer = layers.MoE(D, 4, router=Table(), dtype=torch.bfloat16)
    kept = {name: buffer.dtype for name, buffer in layer.router.named_buffers()}
    assert kept == {"table": torch.int64, "bias": torch.float32, "on": torch.bool}
    y, _ = layer(torch.randn(2, 7, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_a_layer_of_ones_own_takes_them():
    class Twice(layers.Layer):
        @placing.placed
        def __init__(self, d_model, *, device=None, dtype=None):
            super().__init__()
            self.first, self.second = layers.Mamba(d_model), torch.nn.Linear(d_model, d_model)

    made = Twice(8, device="meta", dtype=torch.bfloat16)
    assert made.second.weight.is_meta and made.second.weight.dtype == torch.bfloat16
    assert made.first.A_log.dtype == torch.float32
    with pytest.raises(ValueError, match="parameters are floating point"):
        layers.Mamba(8, dtype=torch.int64)
