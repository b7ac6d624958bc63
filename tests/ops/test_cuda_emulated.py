"""The CUDA C++ kernels without a GPU: compiled for the CPU (`emulate_cuda.h`), against the reference."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doors import reference

from moemamba.ops.conv import cuda as cuda_conv
from moemamba.ops.kit import cuda as cuda_kit
from moemamba.ops.scan import cuda as cuda_scan

COMPILER = shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(const (\w+) s\)')
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and g++")


class Emulated:
    """Stands in for `kit.cuda.Module`."""

    folder: Path

    def __init__(self, source: str, constants: dict[str, int], device: int):
        parts = [f"#define {name} {value}" for name, value in constants.items()]
        parts += [f'#include "{Path(__file__).parents[1] / "tools" / "emulate_cuda.h"}"', source]
        parts += [
            f'extern "C" void start_{name}(int blocks, int threads, const void* s)'
            f" {{ run_grid([](const void* s) {{ {name}(*(const {struct}*)s); }}, s, blocks, threads); }}"
            for name, struct in KERNEL.findall(source)
        ]
        name = "-".join(map(str, constants.values()))
        code, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        code.write_text("\n".join(parts) + "\n")
        options = ["-O1", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        subprocess.run([str(COMPILER), *options, str(code), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(os.fspath(library))

    def launch(self, kernels: list[tuple[str, int, int, int]], arguments: bytes, waiting: bool = False) -> None:
        for name, blocks, threads, shared in kernels:
            assert shared <= 227 * 1024
            self.library[f"start_{name}"](blocks, threads, arguments)


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch, poisoned: None, tmp_path: Path) -> Iterator[None]:
    Emulated.folder = tmp_path
    caches = (cuda_scan._module, cuda_kit.processors, cuda_conv._module, cuda_conv._parts)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(cuda_scan, "Module", Emulated)
    monkeypatch.setattr(cuda_conv, "Module", Emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8))
    yield
    for cache in caches:
        cache.cache_clear()


# One part, and two channels at a time; several parts, sixteen bytes of inputs, then of B and C too, at a time; one
# position, and one channel at a time. `beside` is how many columns B and C lie beside in memory.
@pytest.mark.parametrize(
    ("shape", "dtype", "packed", "beside"),
    [
        ((5, 37, 130, 16), torch.float32, False, 3),
        ((1, 150, 80, 16), torch.bfloat16, True, 3),
        ((1, 150, 80, 16), torch.bfloat16, False, 8),
        ((2, 70, 36, 16), torch.float32, True, 4),
        ((2, 1, 33, 5), torch.float32, False, 3),
    ],
)
def test_equals_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, packed: bool, beside: int) -> None:
    torch.manual_seed(0)
    batch, length, width, n_state = shape
    halves = torch.randn(batch, length, 2 * width).to(dtype)
    slices = torch.randn(batch, length, beside + 2 * n_state).to(dtype)
    halves[:, ::5, width : width + 2] *= 100  # gates that are wide open or shut
    inputs = {
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
    seq_idx = torch.randint(0, 3, (batch, length)).sort(1).values
    seq_idx = torch.where(torch.rand(batch, length) < 0.2, -1, seq_idx).int()
    marks = cuda_scan.position_marks(seq_idx) if packed else None
    dy, dfinal = torch.randn(batch, length, width).to(dtype), torch.randn(batch, width, n_state)

    leaves = {name: t.float().requires_grad_() for name, t in inputs.items()}
    y, final = reference.selective_scan(
        *[leaves[name] for name in NAMES[:8]], True, leaves["initial_state"], seq_idx if packed else None
    )
    expected = torch.autograd.grad([y, final], list(leaves.values()), [dy.float(), dfinal])

    args = [inputs[name] for name in NAMES]
    found, found_final, starts = cuda_scan._forward(*args, marks, True, True)
    gradients = cuda_scan._backward(dy, dfinal, *args, marks, True, starts)

    names = ("y", "final_state", *NAMES)
    for name, a, b in zip(names, (found, found_final, *gradients), (y, final, *expected), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("shape", "dtype", "count", "silu"),
    [
        ((2, 37, 132), torch.float32, 4, True),
        ((1, 150, 80), torch.bfloat16, 4, True),
        ((3, 2, 8), torch.float32, 4, True),
        ((2, 1, 8), torch.float32, 2, False),
        ((1, 9, 260), torch.float32, 1, True),
    ],
)
def test_convolution_equals_reference(shape: tuple[int, int, int], dtype: torch.dtype, count: int, silu: bool) -> None:
    torch.manual_seed(0)
    batch, length, width = shape
    x = torch.randn(batch, length, 2 * width).to(dtype)[..., :width]
    weight, bias, dy = torch.randn(width, count), torch.randn(width), torch.randn(shape).to(dtype)
    dfinal = torch.randn(batch, width, count - 1).to(dtype)
    leaves = [t.float().clone().requires_grad_() for t in (x, weight, bias)]
    outputs = reference.causal_conv1d(*leaves, "silu" if silu else None, None, None)
    expected = torch.autograd.grad(outputs, leaves, (dy.float(), dfinal.float()))
    assert cuda_conv.holds(dy, x, weight)
    found = cuda_conv.backward(dy, dfinal, x, weight, bias, silu)
    for name, a, b in zip(("x", "weight", "bias"), found, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"
