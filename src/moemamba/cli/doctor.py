"""`moemamba doctor`: versions, devices, and which backend each op uses and why."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .info import find_config, size
from .options import Place, Positional
from .terminal import line, parse, show, show_json


@dataclass(frozen=True)
class Doctor:
    """Versions, devices, and which backend each op uses and why; of a model also what slows it down."""

    model: Positional[Place | None] = None
    """a preset, a run directory or a config.json, to say which of its layers decode more slowly, and why"""
    json: bool = False
    """print one JSON object in place of tables"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Doctor, arguments, "doctor")
    slow = slower(asked.model) if asked.model else {}
    if asked.json:
        told = {"versions": dict(versions()), "ops": ops(), "backends": backends()}
        show_json(told | {"layers": slow} if asked.model else told)
        return
    show(versions())
    print()
    show_ops(ops())
    if asked.model:
        print()
        if slow:
            show(slow.items(), (f"layer of {asked.model}", "why its step is no single kernel"))
        else:
            line(f"The kernels of a step know every option of the layers of {asked.model}.")


def show_ops(found: Sequence[dict[str, Any]]) -> None:
    """A row for each op, and each reason once, below."""
    reasons: dict[str, int] = {}
    rows = []
    for op in found:
        others = (
            f"{backend} [{reasons.setdefault(why, len(reasons) + 1)}]" for backend, why in op["other doors"].items()
        )
        rows.append((op["op"], op["device"], op["backend"], op["computes"], ", ".join(others)))
    show(rows, ("op", "device", "backend", "computes", "not used, and why"))
    if reasons:
        print()
        show([(f"[{number}]", why) for why, number in reasons.items()])


def slower(source: str) -> dict[str, str]:
    """What keeps layers of a model from the fastest paths, by name; see `layers.plain.reasons`.

    Raises:
        ValueError: it is no preset, run directory or config.json.
    """
    import torch

    from ..layers.plain import reasons
    from ..model import MoEMamba

    config = find_config(source)
    with torch.device("meta"):
        return reasons(MoEMamba(config))


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


def ops() -> list[dict[str, Any]]:
    """For each op on each kind of device the backend that is chosen, and of each other door why it is not."""
    import torch

    from ..ops.choice import OPS, choose, why_not

    rows = []
    for device in _devices():
        for name, op in sorted(OPS.items()):
            used, others = choose(name, torch.empty(0, device=device)), {}
            for backend, door in op.doors.items():
                if backend != used:
                    asked = f'{used} goes before it; ops.backend("{backend}") asks for it'
                    others[backend] = why_not(backend, device) or door.why_not(device) or asked
            computes = op.doors[used].holds if used in op.doors else "both directions"
            rows.append({"op": name, "device": device, "backend": used, "computes": computes, "other doors": others})
    return rows


def backends() -> list[dict[str, str]]:
    """For each kind of device, why a backend does not run there, or when it does."""
    from ..ops.choice import BACKENDS

    return [
        {"device": device, "backend": name, "whether it can run": backend.why_not(device) or "yes, where it has a door"}
        for device in _devices()
        for name, backend in BACKENDS.items()
    ]


def _devices() -> list[str]:
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
