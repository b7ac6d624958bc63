"""The Triton kernels against the reference: in Triton's interpreter on a CPU, for real where there is a GPU."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moemamba import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="Triton is not installed")

SLOW = pytest.mark.slow
LONG = [(63, False), (100, True)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, scope="module")
def full_precision() -> None:
    """The reference's own matrix products must not round to tf32."""
    torch.set_float32_matmul_precision("highest")


def _packed(batch: int, length: int) -> Tensor:
    """Sequences of random lengths, with padding before, after, between and inside them."""
    seq_idx = torch.randint(0, 5, (batch, length), device=DEVICE).sort(1).values
    return torch.where(torch.rand(batch, length, device=DEVICE) < 0.2, -1, seq_idx).int()


def _scan_inputs(batch: int, length: int, width: int, n_state: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """As a layer passes them: u and z halves of one tensor, B and C slices of another."""
    halves = torch.randn(batch, length, 2 * width, device=DEVICE).to(dtype)
    slices = torch.randn(batch, length, 3 + 2 * n_state, device=DEVICE).to(dtype)
    return {
        "u": halves[..., :width],
        "dt": (torch.randn(batch, length, width, device=DEVICE) - 2).to(dtype),
        "A": -torch.rand(width, n_state, device=DEVICE) * 4 - 0.2,
        "B": slices[..., 3 : 3 + n_state],
        "C": slices[..., 3 + n_state :],
        "D": torch.randn(width, device=DEVICE),
        "z": halves[..., width:],
        "dt_bias": torch.randn(width, device=DEVICE) / 2,
        "initial_state": torch.randn(batch, width, n_state, device=DEVICE),
    }


def _conv_inputs(batch: int, length: int, width: int, count: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        "x": torch.randn(batch, length, 2 * width, device=DEVICE).to(dtype)[..., width:],
        "weight": torch.randn(width, count, device=DEVICE),
        "bias": torch.randn(width, device=DEVICE),
        "initial_state": torch.randn(batch, width, count - 1, device=DEVICE).to(dtype),
    }


def _assert_equal_to_reference(op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor | None]) -> None:
    """Outputs and every gradient by name, in float32 on the reference's side; errors relative to the norm."""
    dtype = next(t.dtype for t in inputs.values() if t is not None)
    names = [name for name, tensor in inputs.items() if tensor is not None]
    weights: list[Tensor] = []
    results = []
    for backend, cast in (("triton", False), ("reference", True)):
        leaves = {
            k: None if t is None else (t.float() if cast else t).detach().requires_grad_() for k, t in inputs.items()
        }
        with ops.backend(backend):
            outputs = op(**leaves)
        weights = weights or [torch.randn_like(t, dtype=torch.float32) for t in outputs]
        scalar = sum((w.to(t.dtype) * t).sum() for w, t in zip(weights, outputs, strict=True))  # an output may be empty
        gradients = torch.autograd.grad(scalar, [leaves[name] for name in names], materialize_grads=True)
        results.append(dict(zip(["y", "final_state", *names], [*outputs, *gradients], strict=True)))
    got, expected = results
    for name, reference in expected.items():
        error = (got[name].double() - reference.double()).norm()
        assert got[name].shape == reference.shape, name
        assert error <= TOLERANCE[dtype] * reference.double().norm() + 1e-30, f"{name}: {error / reference.norm():.1e}"


def _scan(**fixed: object) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda **inputs: ops.selective_scan(**inputs, **fixed)


def _conv(**fixed: object) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda **inputs: ops.causal_conv1d(**inputs, **fixed)


@kernels
@pytest.mark.parametrize(
    ("length", "packed"),
    [(1, False), (1, True), (2, True), (29, True), *(pytest.param(*each, marks=SLOW) for each in LONG)],
)
def test_scan_equals_reference(length: int, packed: bool, poisoned: None) -> None:
    torch.manual_seed(length)
    inputs = _scan_inputs(1, length, 20, 5, torch.float32)
    _assert_equal_to_reference(_scan(seq_idx=_packed(1, length) if packed else None), inputs)


@kernels
@pytest.mark.parametrize(
    ("length", "chunk"),
    [(70, 32), *(pytest.param(length, 256, marks=SLOW) for length in ([257] if INTERPRETED else [257, 1000]))],
)
def test_scan_in_chunks_equals_reference(
    length: int, chunk: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks and more, of which the last is shorter."""
    from moemamba.ops.scan import triton as triton_scan

    monkeypatch.setattr(triton_scan, "PROGRAMS", 10**6)
    monkeypatch.setattr(triton_scan, "CHUNK", chunk)
    torch.manual_seed(length)
    how = triton_scan.plan(1, length, 20, 5)
    assert how.chunked and length > 2 * how.chunk
    _assert_equal_to_reference(_scan(seq_idx=_packed(1, length)), _scan_inputs(1, length, 20, 5, torch.float32))


@kernels
@pytest.mark.parametrize("shape", [(1, 3, 70, 17), (1, 2, 40, 33)])
def test_scan_of_any_width(shape: tuple[int, int, int, int], poisoned: None) -> None:
    torch.manual_seed(0)
    _assert_equal_to_reference(_scan(), _scan_inputs(*shape, torch.float32))


@kernels
def test_nothing_to_scan() -> None:
    inputs = _scan_inputs(2, 0, 20, 5, torch.float32)
    with ops.backend("triton"):
        y, final_state = ops.selective_scan(**inputs)  # type: ignore[arg-type]
        assert y.shape == (2, 0, 20)
        assert torch.equal(final_state, inputs["initial_state"])  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_scan_without(absent: str, poisoned: None) -> None:
    torch.manual_seed(0)
    inputs = _scan_inputs(1, 6, 20, 5, torch.float32)
    _assert_equal_to_reference(_scan(), {**inputs, absent: None})


@kernels
def test_scan_with_steps_as_they_are() -> None:
    torch.manual_seed(0)
    inputs = _scan_inputs(1, 6, 20, 5, torch.float32)
    inputs["dt"] = torch.rand(1, 6, 20, device=DEVICE)
    _assert_equal_to_reference(_scan(dt_softplus=False), {**inputs, "dt_bias": None})


@kernels
def test_softplus_at_both_ends() -> None:
    torch.manual_seed(0)
    inputs = _scan_inputs(1, 9, 20, 5, torch.float32)
    inputs["dt"] = torch.linspace(-30, 30, 180, device=DEVICE).view(1, 9, 20)
    _assert_equal_to_reference(_scan(), inputs)


@kernels
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 100, pytest.param(257, marks=SLOW)])
def test_conv_equals_reference(length: int, packed: bool, count: int, poisoned: None) -> None:
    if INTERPRETED and (length, count) not in {(1, 4), (2, 2), (63, 1), (100, 4), (257, 4)}:
        pytest.skip("slow in the interpreter")
    torch.manual_seed(length)
    seq_idx = _packed(2, length) if packed else None
    _assert_equal_to_reference(_conv(seq_idx=seq_idx), _conv_inputs(2, length, 20, count, torch.float32))


@kernels
@pytest.mark.parametrize("width", [20, pytest.param(130, marks=SLOW)])
@pytest.mark.parametrize("absent", ["bias", "initial_state"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_without(absent: str, activation: str | None, width: int, poisoned: None) -> None:
    torch.manual_seed(0)
    inputs = _conv_inputs(2, 7, width, 4, torch.float32)
    _assert_equal_to_reference(_conv(activation=activation), {**inputs, absent: None})


@kernels
def test_conv_of_several_tiles(poisoned: None) -> None:
    torch.manual_seed(0)
    _assert_equal_to_reference(_conv(), _conv_inputs(1, 3, 130, 4, torch.float32))


def test_compiles_whole() -> None:
    """torch.compile passes through the public functions without a break, here with nothing but the ops' fake side."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    from moemamba.ops.conv import triton as triton_conv
    from moemamba.ops.scan import triton as triton_scan

    with FakeTensorMode():
        x, weight = torch.empty(2, 9, 20), torch.empty(20, 4)
        u, A, B = torch.empty(2, 9, 20), torch.empty(20, 5), torch.empty(2, 9, 5)
        scan = triton_scan._forward(u, u, A, B, B, None, None, None, None, None, True, True)
        conv = triton_conv._forward(x, weight, None, None, None, None, None, True, False)
    assert [t.shape for t in scan[:2]] == [(2, 9, 20), (2, 20, 5)]
    assert [t.shape for t in conv] == [(2, 9, 20), (2, 20, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(3, 257, 100, 16), (1, 3000, 130, 16), (2, 1000, 96, 64), (2, 63, 48, 100)])
def test_scan_on_a_gpu(shape: tuple[int, int, int, int], packed: bool, dtype: torch.dtype, poisoned: None) -> None:
    torch.manual_seed(0)
    seq_idx = _packed(*shape[:2]) if packed else None
    _assert_equal_to_reference(_scan(seq_idx=seq_idx), _scan_inputs(*shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_conv_on_a_gpu(packed: bool, dtype: torch.dtype, poisoned: None) -> None:
    torch.manual_seed(0)
    seq_idx = _packed(3, 1000) if packed else None
    _assert_equal_to_reference(_conv(seq_idx=seq_idx), _conv_inputs(3, 1000, 300, 4, dtype))


@pytest.mark.gpu
def test_results_are_the_same_from_run_to_run() -> None:
    torch.manual_seed(0)
    inputs = {k: v.requires_grad_() for k, v in _scan_inputs(4, 2000, 256, 16, torch.bfloat16).items() if v is not None}
    runs = [torch.autograd.grad(ops.selective_scan(**inputs)[0].sum(), list(inputs.values())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """The last row of a batch whose tensors hold more elements than 32 bits can count equals that row alone."""
    length, width = 2**20 + 8, 128
    inputs = {
        k: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for k, shape in {"u": (17, length, width), "B": (17, length, 8), "C": (17, length, 8)}.items()
    }
    A, weight = -torch.rand(width, 8, device="cuda") - 0.2, torch.randn(width, 4, device="cuda")
    with torch.no_grad():
        u, B, C = inputs.values()
        y, _ = ops.selective_scan(u, u, A, B, C)
        alone, _ = ops.selective_scan(u[-1:], u[-1:], A, B[-1:], C[-1:])
        assert u.numel() > 2**31
        torch.testing.assert_close(y[-1:], alone, rtol=2e-2, atol=2e-2)
        y, _ = ops.causal_conv1d(u, weight)
        assert torch.equal(y[-1:], ops.causal_conv1d(u[-1:], weight)[0])


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_compiles_whole_on_a_gpu() -> None:
    torch.manual_seed(0)
    inputs = {k: v.requires_grad_() for k, v in _scan_inputs(2, 100, 64, 16, torch.bfloat16).items() if v is not None}
    weight = torch.randn(64, 4, device="cuda", requires_grad=True)

    def block(weight: Tensor, u: Tensor, **rest: Tensor) -> Tensor:
        x, _ = ops.causal_conv1d(u * 2, weight)
        return ops.selective_scan(x, **rest)[0] * 3

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        y = function(weight, **inputs)
        results.append([y, *torch.autograd.grad(y.float().sum(), [weight, *inputs.values()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager.float(), compiled.float(), rtol=5e-2, atol=5e-2)
