"""The CUDA C++ convolution's gradients against the reference; all of it needs an NVIDIA GPU."""

import pytest
import torch

from moemamba import ops

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 2, 36), (2, 63, 1028), (5, 257, 132), (1, 3000, 512), (2, 100, 50)])
@pytest.mark.parametrize(("count", "activation", "biased"), [(4, "silu", True), (3, None, True), (2, "silu", False)])
def test_equals_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, count: int, activation: str | None, biased: bool
) -> None:
    torch.manual_seed(0)
    batch, length, width = shape
    with torch.device("cuda"):
        x = torch.randn(batch, length, 2 * width).to(dtype)[..., :width]  # a half of what in_proj gives
        weight, bias = torch.randn(width, count), torch.randn(width) if biased else None
        dy = torch.randn(batch, length, width).to(dtype)
    results = []
    for backend, kind in (("cuda", dtype), ("reference", torch.float32)):
        leaves = [x.detach().to(kind).requires_grad_()]
        leaves += [t.clone().requires_grad_() for t in (weight, bias) if t is not None]
        with ops.backend(backend):
            y, _ = ops.causal_conv1d(*leaves, activation=activation)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    for name, a, b in zip(("y", "x", "weight", "bias"), *results, strict=False):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("length", [2, 3, 60])
def test_gradient_of_the_state_left_behind(length: int) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        x, weight, weights = torch.randn(3, length, 64), torch.randn(64, 4), torch.randn(3, 64, 3)
    results = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with ops.backend(backend):
            y, final = ops.causal_conv1d(*leaves)
        results.append(torch.autograd.grad(y.square().sum() + (final * weights).sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_with_state_and_packed_rows() -> None:
    """What the CUDA kernels do not cover gives the same gradients under the same name, by the Triton kernels."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        x, weight, state = torch.randn(2, 50, 64), torch.randn(64, 4), torch.randn(2, 64, 3)
        seq_idx = torch.arange(50).div(20, rounding_mode="floor").expand(2, -1).int()
    results = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, state)]
        with ops.backend(backend):
            y, final = ops.causal_conv1d(leaves[0], leaves[1], initial_state=leaves[2], seq_idx=seq_idx)
        results.append(torch.autograd.grad((y.square().sum() + final.square().sum()), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_repeats_bit_for_bit() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        x, weight = torch.randn(4, 2000, 256).bfloat16().requires_grad_(), torch.randn(256, 4, requires_grad=True)
    runs = [torch.autograd.grad(ops.causal_conv1d(x, weight)[0].sum(), [x, weight]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
