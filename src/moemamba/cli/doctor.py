"""`moemamba doctor`: versions, devices, and which backend each op uses and why."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from .info import size
from .terminal import parse, show, show_json

OPTIMISED = ("cuda", "triton", "cpu")  # backends besides the reference, the first that can run is chosen


@dataclass(frozen=True)
class Doctor:
    """Versions, devices, and which backend each op uses and why."""

    json: bool = False
    """print one JSON object in place of tables"""


OPS, REASONS = ("op", "device", "backend", "has kernels too"), ("device", "backend", "whether it can run")


def main(arguments: Sequence[str]) -> None:
    if parse(Doctor, arguments, "doctor").json:
        show_json(
            {
                "versions": dict(versions()),
                "ops": [dict(zip(OPS, row, strict=True)) for row in backends()],
                "backends": [dict(zip(REASONS, row, strict=True)) for row in reasons()],
            }
        )
        return
    show(versions())
    print()
    show(backends(), OPS)
    print()
    show(reasons(), REASONS)


def versions() -> list[tuple[str, str]]:
    """What the package stands on, and the devices there are."""
    import torch

    rows = [
        ("moemamba", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for name in ("torch", "triton", "numba", "numpy", "tokenizers"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    instructions = torch.backends.cpu.get_cpu_capability()
    rows.append(("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {size(device.total_memory)}, CUDA {torch.version.cuda}"))
    if not torch.cuda.is_available():
        build = f"no device, though torch is built for CUDA {torch.version.cuda}"
        rows.append(("cuda", build if torch.version.cuda else "none: torch is a build for the CPU"))
    return rows


def backends() -> list[tuple[str, ...]]:
    """One row for each op on each kind of device."""
    import torch

    from .. import ops
    from ..ops.choice import KERNELS

    rows: list[tuple[str, ...]] = []
    for device in _devices():
        for op in sorted({op for kernels in KERNELS.values() for op in kernels}):
            used = ops.choose(op, torch.empty(0, device=device))
            others = [name for name in OPTIMISED if name != used and op in KERNELS[name]]
            rows.append((op, device, used, ", ".join(others)))
    return rows


def reasons() -> list[tuple[str, ...]]:
    """For each kind of device, why a backend does not run there, or when it does."""
    from .. import ops

    return [
        (device, name, ops.why_not(name, device) or "yes, where it has a kernel")
        for device in _devices()
        for name in OPTIMISED
    ]


def _devices() -> list[str]:
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
