"""Our kernels against mamba-ssm's and causal-conv1d's, or the plain-PyTorch reference where those are not installed.

    python benchmarks/ops.py [--only conv]

A case is two ways to compute the same thing. Outputs and gradients are compared first, relative to their norm; a case
that fails is not timed and the exit status is 1. Times are medians of CUDA events, the two sides taking turns. The last
line is JSON: milliseconds of both sides and how many times faster ours is, forward and backward, by case.

Both packages build from their PyPI source distributions (MAMBA_KEEP_CUDA_BUILD=TRUE keeps mamba-ssm's Mamba-1 kernels).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from moemamba import ops

try:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError:
    causal_conv1d_fn = selective_scan_fn = selective_state_update = None

SHAPES = [(256, 256, 1024, 16), (8, 2048, 1536, 16), (2, 16384, 2048, 16), (1, 131072, 1024, 16)]  # b, l, i, n
TOLERANCE = 2e-2  # both sides round to bfloat16
ROUNDS = 15


class Side(NamedTuple):
    """One way to compute a case: a function of tensors, and the tensors, of which all have gradients or none."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    time_last: bool = False  # tensors of three dimensions are (b, i, l) rather than (b, l, i)


class Case(NamedTuple):
    name: str
    ours: Side
    theirs: Side


def scan_cases() -> Iterator[Case]:
    """Everything fused: gate, skip, softplus, bias. Each side gets its tensors as it likes them best."""
    for b, l, i, n in SHAPES:  # noqa: E741
        A = -torch.rand(i, n, device="cuda") * 8 - 0.5
        D, dt_bias = torch.randn(i, device="cuda"), torch.randn(i, device="cuda") - 4
        inputs = [
            _normal(b, l, i),
            _normal(b, l, i),
            A,
            _normal(b, l, n),
            _normal(b, l, n),
            D,
            _normal(b, l, i),
            dt_bias,
        ]

        def ours(*inputs: Tensor) -> Tensor:
            return ops.selective_scan(*inputs)[0]

        def mamba_ssm(*inputs: Tensor) -> Tensor:
            return selective_scan_fn(*inputs, delta_softplus=True)

        yield _case(f"scan {b}x{l}x{i}x{n}", ours, mamba_ssm, inputs)


def conv_cases() -> Iterator[Case]:
    for b, l, i, _ in SHAPES:  # noqa: E741
        inputs = [_normal(b, l, i), torch.randn(i, 4, device="cuda"), torch.randn(i, device="cuda")]

        def ours(*inputs: Tensor) -> Tensor:
            return ops.causal_conv1d(*inputs)[0]

        def causal_conv1d(*inputs: Tensor) -> Tensor:
            return causal_conv1d_fn(*inputs, activation="silu")

        yield _case(f"conv {b}x{l}x{i}", ours, causal_conv1d, inputs)


def step_cases() -> Iterator[Case]:
    """One token of decoding, called as a decoder would: without gradients."""
    i, n = 1024, 16
    for b in (1, 64, 256):
        A, D, dt_bias = (
            -torch.rand(i, n, device="cuda") * 8 - 0.5,
            torch.randn(i, device="cuda"),
            torch.randn(i, device="cuda"),
        )
        inputs = [_normal(b, i), _normal(b, i), A, _normal(b, n), _normal(b, n), D, _normal(b, i), dt_bias]
        state = torch.randn(b, i, n, device="cuda")

        def ours(
            u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor
        ) -> Tensor:
            one = [t[:, None] for t in (u, dt, B, C, z)]
            return ops.selective_scan(one[0], one[1], A, one[2], one[3], D, one[4], dt_bias, initial_state=state)[0][
                :, 0
            ]

        def mamba_ssm(
            u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor
        ) -> Tensor:
            return selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus=True)

        theirs = (
            Side(mamba_ssm, [*inputs, state.clone()]) if selective_state_update else _reference(ours, [*inputs, state])
        )
        yield Case(f"step {b}x{i}x{n}", Side(ours, [*inputs, state]), theirs)


CASES: dict[str, Callable[[], Iterator[Case]]] = {"scan": scan_cases, "conv": conv_cases, "step": step_cases}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _case(name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]) -> Case:
    """A case with gradients, against the other package (time last) if it is installed."""
    side = Side(ours, [t.requires_grad_() for t in inputs])
    if selective_scan_fn is None:
        return Case(name, side, _reference(ours, side.inputs))
    last = [t.detach().transpose(1, 2).contiguous() if t.dim() == 3 else t.detach().clone() for t in inputs]
    return Case(name, side, Side(theirs, [t.requires_grad_() for t in last], time_last=True))


def _reference(ours: Callable[..., Tensor], inputs: list[Tensor]) -> Side:
    def reference(*inputs: Tensor) -> Tensor:
        with ops.backend("reference"):
            return ours(*inputs)

    return Side(reference, inputs)


def _check(case: Case) -> str | None:
    """What differs between the sides, if anything does by more than rounding."""
    results = []
    weight: Tensor | None = None
    for side in (case.ours, case.theirs):
        y = side.function(*side.inputs)
        if weight is None:
            weight = torch.randn_like(y)
        w = weight.transpose(1, 2) if side.time_last else weight
        gradients = torch.autograd.grad(y, side.inputs, w) if y.requires_grad else ()
        found = [y.detach(), *gradients]
        results.append([t.transpose(1, 2) if side.time_last and t.dim() == 3 else t for t in found])
        del y, gradients, found
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        error = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE:
            return f"{'output' if index == 0 else f'gradient of input {index - 1}'} differs by {error:.1e}"
    return None


def _time(calls: list[Callable[[], object]], repeat: int) -> list[float]:
    """Milliseconds of each call, the calls taking turns; `repeat` of them in a row where one is short.

    Clearing a large buffer first empties the cache, and keeps the GPU busy while the host queues the call.
    """
    samples: list[list[float]] = [[] for _ in calls]
    flush = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    for _ in range(ROUNDS + 2):
        for call, times in zip(calls, samples, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            for _ in range(repeat):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeat)
    return [median(times[2:]) for times in samples]


def _measure(case: Case) -> dict[str, float]:
    sides = (case.ours, case.theirs)

    def forward(side: Side) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return side.function(*side.inputs)

        return call

    def backward(side: Side) -> Callable[[], object]:
        y = side.function(*side.inputs)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, side.inputs, dy, retain_graph=True)

    row: dict[str, float] = {}
    passes = {"forward": forward, "backward": backward} if case.ours.inputs[0].requires_grad else {"forward": forward}
    for name, make in passes.items():
        ours, theirs = _time([make(side) for side in sides], 1 if "backward" in passes else 50)
        row |= {
            f"{name}_ms": round(ours, 4),
            f"{name}_theirs_ms": round(theirs, 4),
            f"{name}_ratio": round(theirs / ours, 2),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one kind of case")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "this benchmark needs a GPU"}))
        return 0
    if selective_scan_fn is None:
        print("mamba-ssm and causal-conv1d are not installed: comparing with the plain-PyTorch reference")
    results: dict[str, dict[str, float] | str] = {}
    failed = False
    for kind in [only] if only else CASES:
        for case in CASES[kind]():
            wrong = _check(case)
            failed |= wrong is not None
            results[case.name] = wrong or _measure(case)
            print(f"{case.name:28} {results[case.name]}", flush=True)
            torch.cuda.empty_cache()
    against = "reference" if selective_scan_fn is None else "mamba-ssm, causal-conv1d"
    print(json.dumps({"device": torch.cuda.get_device_name(), "against": against, "cases": results}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
