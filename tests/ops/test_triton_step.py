"""One decoded token: the kernels of a whole Mamba layer and of the most likely word, against the reference."""

import pytest
import torch

from moemamba import ops

pytest.importorskip("triton")

from moemamba.ops.experts import triton_few as triton_experts_few
from moemamba.ops.mamba_step import triton_cuts as triton_step_cuts
from moemamba.ops.mamba_step import triton_many as triton_step_many
from moemamba.ops.router import triton_few as triton_router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's products take bfloat16 for what its bits are as integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
pytestmark = pytest.mark.usefixtures("poisoned")


def make(batch, d=24, width=40, n=16, taps=4, rank=3, norm="rmsnorm", dtype=torch.float32):
    """Arguments of `mamba_step`, by name."""
    torch.manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    tensors = {
        "x": draw(batch, 1, d),
        "conv_state": draw(batch, width, taps - 1),
        "ssm_state": draw(batch, width, n).float(),
        "in_proj": draw(2 * width, d, scale=d**-0.5),
        "conv_weight": draw(width, taps, scale=0.5),
        "conv_bias": draw(width),
        "x_proj": draw(rank + 2 * n, width, scale=width**-0.5),
        "dt_proj": draw(width, rank, scale=0.3),
        "dt_bias": draw(width) - 2,
        "A_log": draw(width, n).abs(),
        "D": draw(width),
        "out_proj": draw(d, width, scale=width**-0.5),
    }
    if norm != "none":
        tensors["norm_weight"] = draw(d)
    if norm == "layernorm":
        tensors["norm_bias"] = draw(d)
    return tensors


def assert_equal(tensors, **options):
    dtype = tensors["x"].dtype
    with ops.backend("reference"):
        expected = ops.mamba_step(**{name: tensor.float() for name, tensor in tensors.items()})
    with ops.backend("triton"):
        got = ops.mamba_step(**tensors, **options)
    for name, a, b in zip(("y", "conv_state", "ssm_state"), got, expected, strict=True):
        error = ((a.float() - b).norm() / b.norm().clamp(min=1e-9)).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
    assert [t.dtype for t in got] == [tensors[name].dtype for name in ("x", "conv_state", "ssm_state")]
    return got


@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 19, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["none", "rmsnorm", "layernorm"])
def test_mamba_step_equals_reference(norm, batch, dtype):
    assert_equal(make(batch, norm=norm, dtype=dtype))


def test_mamba_step_in_bfloat16():
    assert_equal(make(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("batch", [1, 5, 17])
@pytest.mark.parametrize("shape", [{"n": 5}, {"n": 33, "rank": 1}, {"taps": 2}, {"taps": 1}, {"d": 19, "width": 45}])
def test_mamba_step_of_any_shape(shape, batch):
    assert_equal(make(batch, **shape))


@pytest.mark.parametrize("batch", [1, 4])
def test_sums_in_several_parts(batch, monkeypatch):
    monkeypatch.setattr(triton_step_cuts, "cut", lambda *_: triton_step_cuts.Cut(1 if batch == 1 else 16, 16, 16, 4))
    assert_equal(make(batch, d=50, width=70, norm="layernorm"))


def test_shares_of_several_chunks(monkeypatch):
    """Many rows: x_proj is summed up in few shares, however many channels there are."""
    monkeypatch.setattr(triton_step_many, "SHARES", 3)
    monkeypatch.setattr(triton_step_cuts, "cut", lambda *_: triton_step_cuts.Cut(16, 16, 16, 4))
    assert_equal(make(18, d=19, width=90, norm="layernorm"))


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_states_in_place(batch):
    tensors = make(batch)
    before = tensors["conv_state"], tensors["ssm_state"]
    fresh = assert_equal(tensors)
    with ops.backend("triton"):
        _, *after = ops.mamba_step(**tensors, in_place=True)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(after, before, fresh[1:], strict=True))
    with ops.backend("triton"), pytest.raises(ValueError, match="must be contiguous"):
        wide = {**make(batch), "conv_state": torch.zeros(batch, 3, 40, device=DEVICE).transpose(1, 2)}
        ops.mamba_step(**wide, in_place=True)


@DTYPES
@pytest.mark.parametrize(
    ("batch", "d", "words"), [(1, 24, 197), (1, 70, 64), (3, 24, 197), (20, 40, 130), (70, 24, 300)]
)
def test_linear_argmax_is_the_argmax(batch, d, words, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, d, device=DEVICE).to(dtype), torch.randn(words, d, device=DEVICE).to(dtype)
    with ops.backend("triton"):
        got = ops.linear_argmax(x, weight)
    logits = x.float() @ weight.float().T
    gap = logits.max(1).values - logits.gather(1, got[:, None])[:, 0]  # rounding may make several equal
    assert got.dtype == torch.int64 and (gap <= TOLERANCE[dtype] * logits.abs().max()).all()
    if dtype == torch.float32:
        assert torch.equal(got, ops.linear_argmax(x, weight)) and torch.equal(got, logits.argmax(1))


def test_equal_words_give_the_first():
    x, weight = torch.ones(1, 16, device=DEVICE), torch.zeros(200, 16, device=DEVICE)
    weight[[70, 130, 199]] = 1
    with ops.backend("triton"):
        assert ops.linear_argmax(x, weight).tolist() == [70]
        assert ops.linear_argmax(x.expand(3, -1), weight).tolist() == [70] * 3


@DTYPES
@pytest.mark.parametrize(("tokens", "n_experts", "top_k"), [(1, 32, 1), (5, 6, 3), (40, 19, 2)])
@torch.no_grad()
def test_route_chooses_as_the_reference(tokens, n_experts, top_k, dtype, monkeypatch):
    monkeypatch.setattr(triton_router, "ROUTED", 512)  # so that sums come in parts
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 45, device=DEVICE).to(dtype), torch.randn(n_experts, 45, device=DEVICE)
    bias = torch.randn(n_experts, device=DEVICE) / n_experts
    with ops.backend("triton"):
        indices, gates = ops.router_choices(x, weight, bias, top_k)
    with ops.backend("reference"):
        expected = ops.router_choices(x.double(), weight.double(), bias.double(), top_k)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(gates.double(), expected[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_route_takes_the_first_of_equals():
    with ops.backend("triton"):
        indices, gates = ops.router_choices(
            *(torch.zeros(shape, device=DEVICE) for shape in ((3, 16), (7, 16), (7,))), 2
        )
    assert indices.tolist() == [[0, 1]] * 3
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 7))


@DTYPES
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu"])
@pytest.mark.parametrize(("tokens", "top_k", "gated"), [(1, 1, True), (5, 2, True), (3, 1, False)])
def test_experts_of_few_tokens(tokens, top_k, gated, activation, dtype, monkeypatch):
    monkeypatch.setattr(triton_experts_few, "WEIGHTS", 256)  # so that sums come in parts
    torch.manual_seed(0)
    n_experts, d, f, o = 4, 40, 50, 19
    x = torch.randn(tokens, d, device=DEVICE).to(dtype)
    indices = torch.rand(tokens, n_experts, device=DEVICE).topk(top_k).indices
    if tokens > 1:
        indices[1, 0] = n_experts  # dropped
    gates = torch.rand(tokens, top_k, device=DEVICE) if gated else None
    up = (torch.randn(n_experts, f * (2 if activation == "swiglu" else 1), d, device=DEVICE) / d**0.5).to(dtype)
    down = (torch.randn(n_experts, o, f, device=DEVICE) / f**0.5).to(dtype)
    with torch.no_grad():
        assert triton_experts_few.fits(x, indices)
        with ops.backend("triton"):
            got = ops.expert_feedforward(x, indices, gates, up, down, activation=activation)
        with ops.backend("reference"):
            args = (x.float(), indices, gates, up.float(), down.float())
            expected = ops.expert_feedforward(*args, activation=activation)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
