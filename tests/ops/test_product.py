"""The product of inference on the CPU: an output's bits depend on its row and its weights, and on nothing else."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ops
from moemamba.ops.kit.cpu import exact_kernel, lanes
from moemamba.ops.kit.cpu import product as cpu_product

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def linear(x, weight, bias=None):
    with torch.no_grad(), ops.backend("cpu"):
        return ops.linear(x, weight, bias)


def as_written(x, weight):
    """The sum as `lanes.py` describes it, one operation after the other: (t, k), (m, k) -> (t, m).

    float64 holds a product of two float32 numbers exactly; the sum with a third is rounded to float64 first and then to
    float32, which differs from rounding once in hardly any case: those are told apart by the caller's numbers, which
    have few bits.
    """
    k = x.shape[1]
    pad = -k % lanes.LANES
    a, b = (np.pad(t.numpy(), ((0, 0), (0, pad))).astype(np.float64) for t in (x, weight))
    total = np.zeros((len(a), len(b), lanes.LANES), np.float32)
    for start in range(0, k + pad, lanes.LANES):
        each = a[:, None, start : start + lanes.LANES] * b[None, :, start : start + lanes.LANES]
        total = (total.astype(np.float64) + each).astype(np.float32)
    for apart in (8, 4, 2, 1):
        total = total[..., :apart] + total[..., apart : 2 * apart]
    return torch.from_numpy(total[..., 0])


def numbers(*shape):
    """With 12 significant bits, so that sums of float64 are exact enough."""
    return (torch.randint(-2048, 2048, shape) * 2.0 ** torch.randint(-8, 3, shape)).float()


@SETTINGS
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 11), st.integers(0, 2**31))
def test_a_sum_is_what_is_written(k, width, rows, seed):
    torch.manual_seed(seed)
    x, weight = numbers(rows, k), numbers(width, k)
    assert torch.equal(linear(x, weight), as_written(x, weight))


@SETTINGS
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70), st.data())
def test_a_row_is_alone(k, width, rows, data):
    torch.manual_seed(k * width)
    x, weight, bias = torch.randn(rows, k), torch.randn(width, k), torch.randn(width)
    whole = linear(x, weight, bias)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(linear(x[first:last], weight, bias), whole[first:last])
    low = data.draw(st.integers(0, width - 1))
    high = data.draw(st.integers(low + 1, width))
    assert torch.equal(linear(x, weight[low:high], bias[low:high]), whole[:, low:high])


@pytest.mark.parametrize("k", [16, 511, 1536])
def test_many_rows(k):
    """Beyond what stays in a cache: blocks of rows and of weights."""
    torch.manual_seed(0)
    x, weight = torch.randn(2049, k), torch.randn(67, k)
    whole = linear(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-3, atol=1e-3)
    for part in (slice(0, 1), slice(255, 258), slice(1020, 1030), slice(2048, 2049)):
        assert torch.equal(linear(x[part], weight), whole[part])


@pytest.mark.parametrize("shape", [(4, 4), (2, 2), (4, 2), (2, 1)])
def test_tiles_of_any_shape(shape):
    """Those of other machines, too."""
    product = cpu_product.products(*shape)

    @exact_kernel
    def compute(first, last, rows, k, width, x, weight, y):
        product(0, width, rows, k, x, 4 * k, weight, 4 * k, y, 4 * width, 0, 0)

    for rows, k, width in ((1, 5, 3), (3, 33, 9), (7, 64, 6)):
        torch.manual_seed(rows)
        x, weight, y = torch.randn(rows, k), torch.randn(width, k), torch.empty(rows, width)
        compute(0, 1, rows, k, width, x.data_ptr(), weight.data_ptr(), y.data_ptr())
        assert torch.equal(y, linear(x, weight))


def test_threads(monkeypatch):
    monkeypatch.setattr(sys.modules["moemamba.ops.kit.cpu.run"], "WORTH_THREADS", 1)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 37), torch.randn(83, 37), torch.randn(83)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(linear(x, weight, bias))
    torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_what_is_not_a_number_stays_in_its_row():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 21), torch.randn(9, 21)
    expected = linear(x, weight)
    x[2, 20], x[4, 0] = torch.nan, torch.inf
    weight[3, 5] = torch.inf
    found = linear(x, weight)
    assert found[2].isnan().all() and not found[4].isfinite().any()
    kept = [row for row in range(6) if row not in (2, 4)]
    others = [column for column in range(9) if column != 3]
    assert torch.equal(found[kept][:, others], expected[kept][:, others])


def test_rows_that_lie_apart():
    torch.manual_seed(0)
    wide, weight = torch.randn(2, 5, 40), torch.randn(7, 13)
    part = wide[..., 9:22]
    assert torch.equal(linear(part, weight), linear(part.contiguous(), weight))
    turned = torch.randn(13, 4).T
    assert torch.equal(linear(turned, weight), linear(turned.contiguous(), weight))
    assert linear(wide[:, :0, :13], weight).shape == (2, 0, 7)
    assert linear(torch.randn(3, 0), torch.randn(7, 0)).equal(torch.zeros(3, 7))


def test_training_keeps_torchs_products():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 300), torch.randn(50, 300, requires_grad=True)
    y = ops.linear(x, weight)
    assert y.requires_grad and torch.equal(y, x @ weight.T)
