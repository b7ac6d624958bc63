"""A linear layer beside another reader of its input, in Triton, against two uses of that input."""

import pytest
import torch

from moemamba import ops

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # the interpreter errs in that
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def gradients(backend, x, weight, wanted, compiled=False):
    def both(x, weight):
        other, y = ops.linear_beside(x, weight)
        return other.sin(), y

    torch._dynamo.reset()  # every case is one more graph of one function
    call = torch.compile(both, backend="aot_eager", fullgraph=True) if compiled else both
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    with ops.backend(backend):
        outputs = call(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, wanted)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 24, 5), (3, 40, 130, 80), (1, 100, 256, 64), (2, 0, 8, 3)])
def test_equals_two_uses(shape, dtype, compiled):
    torch.manual_seed(0)
    batch, length, d, width = shape
    with torch.device(DEVICE):
        x, weight = torch.randn(batch, length, 2 * d).to(dtype)[..., :d], torch.randn(width, d).to(dtype)
        wanted = [torch.randn(batch, length, d).to(dtype), torch.randn(batch, length, width).to(dtype)]
    found = gradients("triton", x, weight, wanted, compiled)
    expected = gradients("reference", x.float(), weight.float(), [w.float() for w in wanted])
    for name, a, b in zip(("x", "y", "dx", "dweight"), found, expected, strict=True):
        assert a.dtype == dtype, name
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm(), name


def test_under_autocast():
    """A product in another dtype than x's is PyTorch's; in x's, the gradient of a float32 weight is float32."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        x, weight = torch.randn(2, 20, 24), torch.randn(6, 24)
    for kind in (torch.float32, torch.float16):
        leaves = x.to(kind).requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.float16), ops.backend("triton"):
            other, y = ops.linear_beside(*leaves)
        assert (other.dtype, y.dtype) == (kind, torch.float16)
        dx, dweight = torch.autograd.grad(other.float().square().sum() + y.float().sum(), leaves)
        assert (dx.dtype, dweight.dtype) == (kind, torch.float32)
        torch.testing.assert_close(dx.float(), 2 * leaves[0].float() + weight.sum(0), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dweight, x.sum((0, 1)).expand(6, -1), rtol=1e-2, atol=1e-2)
