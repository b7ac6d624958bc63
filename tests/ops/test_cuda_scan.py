"""The CUDA C++ scan against the reference; all of it needs an NVIDIA GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moemamba import ops

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    with torch.device("cuda"):
        yield


def _inputs(batch: int, length: int, width: int, n_state: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    halves = torch.randn(batch, length, 2 * width).to(dtype)
    beside = 8 if width % 8 == 0 else 3  # columns of the same tensor: with 8, sixteen bytes of B and C lie together
    slices = torch.randn(batch, length, beside + 2 * n_state).to(dtype)
    return {
        "u": halves[..., :width],
        "dt": (torch.randn(batch, length, width) - 2).to(dtype),
        "A": -torch.rand(width, n_state) * 4 - 0.2,
        "B": slices[..., beside : beside + n_state],
        "C": slices[..., beside + n_state :],
        "D": torch.randn(width),
        "z": halves[..., width:],
        "dt_bias": torch.randn(width) / 2,
        "initial_state": torch.randn(batch, width, n_state),
    }


def _packed(batch: int, length: int) -> Tensor:
    seq_idx = torch.randint(0, 5, (batch, length)).sort(1).values
    return torch.where(torch.rand(batch, length) < 0.2, -1, seq_idx).int()


def _check(inputs: dict[str, Tensor | None], **fixed: object) -> None:
    """Outputs and every gradient by name, in float32 on the reference's side; errors relative to the norm."""
    dtype = next(t.dtype for t in inputs.values() if t is not None)
    names = [name for name, tensor in inputs.items() if tensor is not None]
    weights: list[Tensor] = []
    results = []
    for backend, cast in (("cuda", False), ("reference", True)):
        leaves = {
            k: None if t is None else (t.float() if cast else t).detach().requires_grad_() for k, t in inputs.items()
        }
        with ops.backend(backend):
            outputs = ops.selective_scan(**leaves, **fixed)  # type: ignore[arg-type]
        weights = weights or [torch.randn_like(t, dtype=torch.float32) for t in outputs]
        scalar = sum((w.to(t.dtype) * t).sum() for w, t in zip(weights, outputs, strict=True))
        gradients = torch.autograd.grad(scalar, [leaves[name] for name in names], materialize_grads=True)
        results.append(dict(zip(["y", "final_state", *names], [*outputs, *gradients], strict=True)))
    wrong = []
    for name, expected in results[1].items():
        error = (results[0][name].double() - expected.double()).norm() / (expected.double().norm() + 1e-30)
        if not error <= TOLERANCE[dtype]:
            wrong.append(f"{name}: {error:.1e}")
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 257, 100, 16),
        (1, 3000, 130, 16),
        (1, 3001, 136, 16),
        (2, 128, 33, 5),
        (2, 1, 64, 16),
        (1, 2, 7, 1),
        (300, 300, 256, 16),
    ],
)
def test_equals_reference(shape: tuple[int, int, int, int], packed: bool, dtype: torch.dtype) -> None:
    _check(_inputs(*shape, dtype), seq_idx=_packed(*shape[:2]) if packed else None)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_without(absent: str) -> None:
    _check({**_inputs(2, 600, 80, 16, torch.float32), absent: None})


def test_steps_as_they_are() -> None:
    inputs = _inputs(2, 600, 80, 16, torch.float32)
    _check({**inputs, "dt": torch.rand(2, 600, 80) / 4, "dt_bias": None}, dt_softplus=False)


def test_softplus_at_both_ends() -> None:
    inputs = _inputs(1, 9, 20, 5, torch.float32)
    _check({**inputs, "dt": torch.linspace(-30, 30, 180).view(1, 9, 20)})


def test_nothing_to_scan() -> None:
    inputs = _inputs(2, 0, 20, 5, torch.float32)
    with ops.backend("cuda"):
        y, final_state = ops.selective_scan(**inputs)  # type: ignore[arg-type]
    assert y.shape == (2, 0, 20)
    assert torch.equal(final_state, inputs["initial_state"])  # type: ignore[arg-type]


def test_what_it_has_no_kernel_for() -> None:
    inputs = _inputs(1, 5, 20, 33, torch.float32)
    ops.selective_scan(**inputs)  # type: ignore[arg-type]
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="up to 16 states"):
        ops.selective_scan(**inputs)  # type: ignore[arg-type]


def test_results_are_the_same_from_run_to_run() -> None:
    inputs = {k: v.requires_grad_() for k, v in _inputs(4, 2000, 256, 16, torch.bfloat16).items() if v is not None}
    runs = [torch.autograd.grad(ops.selective_scan(**inputs)[0].sum(), list(inputs.values())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
