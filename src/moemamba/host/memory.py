"""How much memory a process of this machine can have at most."""

import os
from pathlib import Path


def limit() -> int | None:
    """The smallest of the machine's memory, that of its control groups, and the process's own limit, in bytes.

    None where the system tells none of them.
    """
    found = [_physical(), *_groups(), _address_space()]
    return min((size for size in found if size), default=None)


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min((size for size in soft if size != resource.RLIM_INFINITY), default=None)


def _groups() -> list[int]:
    """Limits of the control groups (containers, batch systems) that the process is in, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            folders = [root / inside.lstrip("/"), *(root / inside.lstrip("/")).parents]
            limits += [size for folder in folders if folder.is_relative_to(root) and (size := _number(folder / name))]
    return limits


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None
