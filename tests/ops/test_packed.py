"""Weights of 8 bits: what they stand for, and kernels beside dense products in float64."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ops
from moemamba.ops.experts import cpu_exact
from moemamba.ops.kit.cpu import entry, exact_kernel, packed
from moemamba.ops.kit.cpu.product import blocks
from moemamba.ops.kit.packed import LARGEST, pack
from moemamba.ops.mamba_step import cpu as mamba_step

running = sys.modules["moemamba.ops.kit.cpu.run"]  # `run` is a function of the package too

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SIZES = st.integers(1, 90)
needs_cpu = pytest.mark.skipif(ops.why_not("cpu", "cpu") is not None, reason="no CPU kernels here")


def random(*shape, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))
    return torch.randn(*shape, generator=generator) * scales


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@SETTINGS
@given(SIZES, SIZES, st.integers(0, 5))
def test_rounded_to_the_nearest_level(rows, columns, seed):
    weight = random(rows, columns, seed=seed, spread=5)
    weight[seed % rows] = 0
    found = pack(weight)
    assert found.shape == weight.shape and found.values.dtype == torch.int8 and found.scale.dtype == torch.float32
    assert found.values.abs().max() <= LARGEST
    assert ((found.dense() - weight).abs() <= 0.5001 * found.scale[:, None]).all()
    assert torch.equal(pack(found.dense()).values, found.values)  # what is of 8 bits stays as it is


def test_a_stack_is_rounded_row_by_row():
    stack = random(3, 5, 7)
    found = pack(stack)
    for e in range(3):
        own = pack(stack[e])
        assert torch.equal(found.values[e], own.values) and torch.equal(found.scale[e], own.scale)


def bound(x, weight):
    """Of the rounding of x in a product: half a level for each entry, and float32's own."""
    k = x.shape[-1]
    level = x.abs().amax(-1, keepdim=True).double() / min(32767, (2**31 - 1) // (127 * k))
    return 0.51 * level * weight.abs().sum(-1) + 1e-6 * (x.abs().double() @ weight.abs().T)


@needs_cpu
@SETTINGS
@given(SIZES, st.integers(1, 700), SIZES, st.integers(0, 9))
def test_linear_is_that_of_dense_weights(rows, width_in, width_out, seed):
    x, weight, bias = random(rows, width_in, seed=seed, spread=3), pack(random(width_out, width_in)), random(width_out)
    with ops.backend("cpu"):
        y = ops.linear(x, weight, bias)
    dense = weight.dense(torch.float64)
    expected = x.double() @ dense.T + bias
    assert ((y - expected).abs() <= bound(x, dense) + 1e-6 * expected.abs()).all()


@needs_cpu
@pytest.mark.parametrize("width", [1, 31, 32, 33, 516, 517, 5000, 40_000])
def test_sums_never_overflow(width):
    """The largest numbers everywhere, of which 32 bits hold the sum."""
    x, weight = torch.ones(3, width), pack(torch.ones(2, width))
    with ops.backend("cpu"):
        y, z = ops.linear(x, weight), ops.linear(-x, weight)
    assert torch.allclose(y, torch.full((3, 2), float(width)), rtol=1e-5) and torch.equal(y, -z)


@needs_cpu
def test_rows_that_are_not_finite_or_nothing():
    x, weight = torch.randn(5, 40), pack(torch.randn(6, 40))
    alone = ops.linear(x, weight)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0
    y = ops.linear(x, weight)
    assert y[1].isnan().all() and y[2].isnan().all() and (y[3] == 0).all()
    assert torch.equal(y[[0, 4]], alone[[0, 4]])  # and it reaches no other
    assert ops.linear(x[:0], weight).shape == (0, 6)
    assert ops.linear(torch.empty(2, 0), pack(torch.empty(3, 0))).tolist() == [[0] * 3] * 2


@needs_cpu
@pytest.mark.parametrize("instruction", ["", "avx2", "avx512bw"])
def test_every_machine_has_the_same_bits(instruction, monkeypatch):
    """Whatever instruction multiplies: sums of whole numbers are exact."""
    if instruction and not packed.llvm.get_host_cpu_features().get(instruction):
        pytest.skip(f"this machine has no {instruction}")
    x, weight = random(3, 77), pack(random(6, 77))
    expected = ops.linear(x, weight)
    monkeypatch.setattr(packed, "_PAIRS", instruction)
    product, round_rows = blocks(2, 2, packed.PackedTile), packed.round_rows

    @exact_kernel
    def kernel(at: tuple, rows: int, k: int, columns: int, x: int, levels: int, w: int, scale: int, y: int) -> None:
        round_rows(at, 0, rows, rows, k, x, 4 * k, levels)
        scales, step = packed.places(levels, k, rows)
        product(0, columns, rows, k, levels, step, w, k, y, 4 * columns, scales, scale)

    levels, y = torch.empty(3 * packed.room(77)), torch.empty(3, 6)
    kernel((0, 0, entry(round_rows)), 3, 77, 6, *(t.data_ptr() for t in (x, levels, *weight, y)))
    assert torch.equal(y, expected)


@needs_cpu
@SETTINGS
@given(st.integers(0, 9), st.integers(1, 3), st.booleans(), st.sampled_from(["relu", "gelu", "swiglu", "geglu"]))
def test_experts_are_those_of_dense_weights(tokens, top_k, of_8_bits_both, activation):
    d, hidden, n_experts = 37, 29, 5
    x, gates = random(tokens, d), torch.rand(tokens, top_k)
    indices = torch.randint(0, n_experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    up = pack(random(n_experts, 2 * hidden if "glu" in activation else hidden, d))
    down = random(n_experts, 11, hidden)
    down = pack(down) if of_8_bits_both else down
    given = {"activation": activation, "down_bias": random(n_experts, 11)}
    with ops.backend("cpu"):
        y = ops.expert_feedforward(x, indices, gates, up, down, **given)
        z = ops.expert_linear(x, indices, gates, up)
    with ops.backend("reference"):
        expected = ops.expert_feedforward(x, indices, gates, up, down, **given)
        also = ops.expert_linear(x, indices, gates, up)
    for ours, theirs in ((y, expected), (z, also)):
        assert ours.shape == theirs.shape and ((ours - theirs).abs() <= 1e-3 * theirs.abs().sum()).all()


@needs_cpu
def test_a_step_is_that_of_dense_weights():
    d, width, n, k, r, rows = 33, 48, 5, 4, 3, 6
    weights = [
        pack(random(2 * width, d)), random(width, k), random(width), pack(random(r + 2 * n, width)), random(width, r),
        random(width), torch.rand(width, n), random(width), pack(random(d, width)),
    ]  # fmt: skip
    x, state = random(rows, 1, d), (random(rows, width, k - 1), random(rows, width, n))
    with ops.backend("cpu"):
        found = ops.mamba_step(x, *state, *weights)
    with ops.backend("reference"):
        expected = ops.mamba_step(x, *state, *weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_no_gradient_passes():
    x, weight = torch.randn(2, 8, requires_grad=True), pack(torch.randn(3, 8))
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="8 bits"):
            ops.linear(x, weight)
        with pytest.raises(RuntimeError, match="8 bits"):
            ops.linear_cross_entropy(x, weight, torch.tensor([0, 1]))
        assert not ops.linear(x.detach(), weight).requires_grad


def test_other_dtypes_and_backends_read_them_dense():
    x, weight = torch.randn(4, 16), pack(torch.randn(3, 16))
    dense = weight.dense()
    with ops.backend("reference"):
        assert torch.equal(ops.linear(x, weight), x @ dense.T)
    half = ops.linear(x.bfloat16(), weight)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), x @ dense.T, atol=0.1)
    double = ops.linear(x.double(), weight)
    assert torch.allclose(double, x.double() @ weight.dense(torch.float64).T, rtol=1e-12)
    with pytest.raises(ValueError, match="weight"):
        ops.linear(torch.randn(2, 5), weight)


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2])
@SETTINGS
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70), st.data())
def test_steps_reserve_what_they_write(threads, rows, d, width, drawn):
    """Nothing is written behind what is reserved, and rows are rounded in no room where nothing is of 8 bits."""
    of_8_bits = drawn.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    n, k, r, n_experts, top_k = 3, 4, 2, 3, 2
    shapes = (2 * width, d), (r + 2 * n, width), (d, width), (n_experts, width, d), (n_experts, d, width)
    made_of = zip(of_8_bits, shapes, strict=True)
    in_proj, x_proj, out_proj, up, down = (
        pack(random(*shape)) if packs else random(*shape) for packs, shape in made_of
    )
    weights = [in_proj, random(width, k), random(width), x_proj, random(width, r), random(width)]
    weights += [torch.rand(width, n), random(width), out_proj]
    state = random(rows, width, k - 1).mT.contiguous().mT, random(rows, width, n).mT.contiguous().mT
    x, y, indices = random(rows, 1, d), torch.zeros(rows, 1, d), torch.randint(0, n_experts + 1, (rows, top_k))
    made = []

    def new(*shape, dtype=torch.float32):
        size = math.prod(shape)
        made.append(torch.full((size + 64,), 7, dtype=dtype))
        return made[-1][:size].view(shape)

    with pytest.MonkeyPatch.context() as patch, ops.backend("cpu"):
        for module in (mamba_step, cpu_exact, running):
            patch.setattr(module, "WORTH_THREADS", 0)
        for module in (mamba_step, cpu_exact):
            patch.setattr(module, "new", new)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        ops.mamba_step(x, *state, *weights)
        ops.prepare_mamba_step(x[:, 0], *state, (*weights, None), y[:, 0])(rows)
        step, one = made[-1], len(made)
        ops.expert_feedforward(x[:, 0], indices, torch.rand(rows, top_k), up, down)
        ops.prepare_experts(x[:, 0], indices, torch.rand(rows, top_k), up, down, y[:, 0], activation="relu")(rows)
        experts = made[-1]
    assert len(made) > one > 1 and all((each[-64:] == 7).all() for each in made)
    room = packed.room(max(d, width))
    assert len(step) - 64 == rows * (3 * width + r + 2 * n + d + room * any(of_8_bits[:3])) + width + 2
    choices = rows * top_k
    assert len(experts) - 64 == 4 * (n_experts + 1) + d + choices * (4 + 2 * d + width + room * any(of_8_bits[3:]))
