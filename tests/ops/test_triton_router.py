"""The Triton kernels of the router against the reference, in the interpreter or on a GPU."""

import pytest
import torch
from doors import reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moemamba import ops
from moemamba.model import _keep_choices

pytest.importorskip("triton")

from moemamba.ops.router import triton as triton_routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered")  # numpy's, of nonsense
TOTALS = ("indices", "gates", "load", "probabilities", "z", "entropy")


def make(tokens=60, d=24, n_experts=6, padding=True, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    x, weight, bias = draw(tokens, d).requires_grad_(), draw(n_experts, d).requires_grad_(), 0.1 * draw(n_experts)
    valid = (draw(tokens) > -1).float() if padding else None
    return x, weight, bias, valid


def results(route, x, weight, bias, valid, top_k, groups, wanted=(1, 3, 4)):
    """The outputs, and the gradients of x and weight from those `wanted`."""
    outputs = route(x, weight, bias, top_k, valid, groups)
    generator = torch.Generator(DEVICE).manual_seed(1)
    seeds = [torch.randn(outputs[i].shape, generator=generator, device=DEVICE) for i in wanted]
    return outputs, torch.autograd.grad([outputs[i] for i in wanted], [x, weight], seeds)


def triton(*args):
    with ops.backend("triton"):
        return ops.router(*args)


@pytest.mark.parametrize(
    ("tokens", "n_experts", "top_k", "groups", "padding"),
    [(60, 6, 1, 1, True), (60, 6, 2, 3, True), (700, 8, 1, 2, False), (9, 1, 1, 1, True), (40, 130, 4, 2, True)],
)
def test_route_with_totals(tokens, n_experts, top_k, groups, padding):
    x, weight, bias, valid = make(tokens, n_experts=n_experts, padding=padding)
    expected, expected_gradients = results(reference.router, x, weight, bias, valid, top_k, groups)
    got, gradients = results(triton, x, weight, bias, valid, top_k, groups)
    for name, a, b in zip(TOTALS, got, expected, strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(1,), (3,), (4,), (3, 4)])
def test_gradients_from_some_of_the_outputs(wanted):
    x, weight, bias, valid = make()
    expected = results(reference.router, x, weight, bias, valid, 2, 2, wanted)[1]
    for a, b in zip(results(triton, x, weight, bias, valid, 2, 2, wanted)[1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nonsense_is_routed_to_different_experts():
    x, weight, bias, _ = make(tokens=5)
    indices, *_ = triton(x.detach() * torch.nan, weight, bias, 3, None, 1)
    assert indices.tolist() == [[0, 1, 2]] * 5


def test_nothing_to_route():
    x, weight, bias, _ = make(tokens=0)
    indices, gates, load, *_ = triton(x, weight, bias, 2, None, 1)
    assert indices.shape == gates.shape == (0, 2) and load.sum() == 0
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(gates.sum(), [x, weight]))


def test_recomputation_keeps_the_choices(monkeypatch):
    x, weight, bias, _ = make()
    calls, product = [], triton_routing.product
    monkeypatch.setattr(triton_routing, "product", lambda *args: calls.append(1) or product(*args))

    def gated(x):
        _, gates, *_ = triton(x, weight, bias, 2, None, 1)
        return (gates * x[:, :2]).sin().sum()

    plain = torch.autograd.grad(gated(x), [x, weight])
    again = checkpoint(gated, x, use_reentrant=False, context_fn=_keep_choices)
    for a, b in zip(torch.autograd.grad(again, [x, weight]), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 2


def test_compile_without_graph_breaks():
    x, weight, bias, valid = make()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    with ops.backend("triton"):
        compiled = torch.compile(ops.router, fullgraph=True, backend=backend)
        routes = (ops.router, compiled)
        plain, traced = ((*r[0], *r[1]) for r in [results(route, x, weight, bias, valid, 2, 2) for route in routes])
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)
