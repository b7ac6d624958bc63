"""What a command says when it cannot go on: one sentence, and the status it ends with."""

import errno
import os
import re
import signal

from ..host.stop import Interrupted
from ..host.terminal import visible

DONE, FAILED, IMPOSSIBLE, SAVED, INTERRUPTED = 0, 1, 2, 75, 130
"""75 is the system's "try again later": saved, and stopped by a scheduler or a terminal that is gone"""

# As Python, the system, PyTorch on CPU and GPU, its allocators and libraries, and ours of a killed process say it.
MEMORY = (
    "out of memory",
    "out_of_memory",
    "allocate memory",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
    "not enough memory",
    "memory may have run out",
    "storage size calculation overflowed",
)
# As gloo and NCCL say that another process of the run is gone.
GONE = (
    "connection reset",
    "connection closed",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "no route to host",
    "connectfullmesh failed",
    "nccl communicator was aborted",
    "timed out waiting",
)


def answer(error: BaseException) -> tuple[int, str] | None:
    """The status and the sentence for an error; None if it is a fault of this program."""
    match error:
        case Interrupted():
            return (INTERRUPTED if error.number == signal.SIGINT else SAVED), ""
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case BrokenPipeError():  # the reader of our output has left, as in `| head`
            return DONE, ""
        case _ if out_of_memory(error):
            return FAILED, (
                f"memory ran out ({first_line(error)}); a smaller model, --batch-size or --context takes less, and so "
                "do --accumulate and --recompute in training; what was saved is not lost"
            )
        case RuntimeError() if together() and _says(error, GONE):
            return FAILED, (
                f"another process of this run is gone ({first_line(error)}); what it said stands in its own output; "
                "go on from what was saved with --resume"
            )
        case ArithmeticError():
            return FAILED, sentence(error)
        case ValueError() | OSError():
            return IMPOSSIBLE, sentence(error)
    return None


def sentence(error: Exception) -> str:
    """What an error says, without the system's error number, in one line."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{_name(error.filename)}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return visible(as_options(text), line=True)


def as_options(text: str) -> str:
    """What an exception says to Python, in words of the command line: `resume=True` is --resume there."""
    text = re.sub(r"\b([a-z_]+)=True\b", lambda found: _option(found[1]), text)
    return re.sub(r'\b([a-z_]+)=(?:"(\w+)"|(N)\b)', lambda found: f"{_option(found[1])} {found[2] or found[3]}", text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return visible((str(error).strip().splitlines() or [type(error).__name__])[0], line=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, the system, PyTorch (on a GPU or not), or of a killed process is about memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError) and _says(error, MEMORY)


def together() -> bool:
    """Whether torchrun, or a scheduler in its place, has started several processes of which this is one."""
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdecimal() and int(size) > 1


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(each in text for each in words)


def _name(file: object) -> str:
    return os.fsdecode(file) if isinstance(file, bytes) else str(file)
