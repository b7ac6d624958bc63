"""A lock that one process holds and that ends with it, however that ends: a file that the system keeps locked."""

import errno
import json
import os
import socket
import stat
import time
from pathlib import Path

from .files import FileError, writing

BUSY = {errno.EAGAIN, errno.EACCES}


class Lock:
    """A lock on a file, which stays when the lock is released: to remove it would race with who takes it next.

    Attributes:
        holds: whether it is held. Where the file system has no locks, nobody holds it, and everybody may go on.
    """

    def __init__(self, file: Path):
        self.file = file
        self._descriptor: int | None = None

    @property
    def holds(self) -> bool:
        """Whether this process has it."""
        return self._descriptor is not None

    def take(self) -> str | None:
        """Take the lock; None, or who else has it (may be empty if that is not known).

        Raises:
            FileError: the lock's file is a link, a pipe or a device.
            OSError: it cannot be written.
        """
        with writing(self.file):
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EISDIR):
                    raise FileError(f"{self.file} is not a regular file; remove it") from error
                raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileError(f"{self.file} is not a regular file; remove it")
        held = _locked(descriptor)
        if not held:
            owner = _owner(self.file) if held is False else None
            os.close(descriptor)
            return owner
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _me().encode())
        return None

    def release(self) -> None:
        """Let others take it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(descriptor: int) -> bool | None:
    """Whether the system gave the lock; None if it has none here.

    `flock` first, which other threads of this process respect too, and which NFS passes on for files that are open for
    writing; else POSIX locks, which some file systems have alone.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in BUSY:
                return False
    return None


def _me() -> str:
    said = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    if job := os.environ.get("SLURM_JOB_ID"):
        said["job"] = job
    return json.dumps(said) + "\n"


def _owner(file: Path) -> str:
    """Who wrote the file, for a message; it may just be writing."""
    try:
        values = json.loads(file.read_bytes()[:1000])
        return ", ".join(f"{name} {values[name]}" for name in ("host", "process", "job", "since") if name in values)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
