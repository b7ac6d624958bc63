"""The command line, one file a command.

What needs torch is imported by the function that uses it, so that help and mistakes answer at once.
"""

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..presets import presets
from ..training.stop import Interrupted

# Each command is the function `main(arguments)` of the file of its name.
COMMANDS = {
    "train": "[PRESET]             train a model",
    "prepare": "DATA                 tokenise a text once, for runs to come",
    "compare": "MODEL MODEL ...      train models on the same batches over seeds; a table and a report",
    "paper": "TABLE                a table of the MoE-Mamba paper, run again at a size of your choice",
    "report": "COMPARISON ...       comparisons that were run, on one page",
    "generate": "RUN                  continue a prompt",
    "eval": "RUN                  loss, perplexity and bits per byte on a text",
    "info": "PRESET|RUN|FILE      layers, parameters, operations and memory of a model",
    "doctor": "                     versions, devices, and which backend each op uses and why",
}


def main() -> None:
    """Run the command of `sys.argv` and exit.

    0 done, 1 failed, 2 asked for the impossible, 130 interrupted (Ctrl-C), 75 (the system's "try again later") saved
    and stopped because a scheduler said so with SIGTERM or SIGUSR1.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("MOEMAMBA_DEBUG") == "1"
    try:
        run(arguments)
    except Interrupted as stopped:
        sys.exit(130 if stopped.number == signal.SIGINT else 75)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError) as error:
        if debug:
            raise
        print(f"moemamba: {_sentence(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ArithmeticError) else 2)
    except (MemoryError, RuntimeError) as error:
        if debug or not _out_of_memory(error):
            raise
        print(
            f"moemamba: memory ran out ({str(error).splitlines()[0]}); a smaller model, --batch-size or --context "
            "takes less, and so do --accumulate and --recompute in training; what was saved is not lost",
            file=sys.stderr,
        )
        sys.exit(1)


def run(arguments: Sequence[str]) -> None:
    """One command; raises what it raises, and SystemExit after help and for unknown options."""
    if arguments[:1] == ["--"]:  # keeps `torchrun -m moemamba -- train --run ...` from reading our options
        arguments = arguments[1:]
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        import_module(f".{name}", __name__).main(rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        known = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no command {name!r}; {known}")


def _overview() -> str:
    lines = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: moemamba COMMAND [options]\n\n{lines}\n\nmoemamba COMMAND --help says more about one.\n"
        f"Presets: {', '.join(presets())}."
    )


def _sentence(error: Exception) -> str:
    """What an error says, without the system's error number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, of PyTorch (on a GPU or not), or of a process that was killed is about memory."""
    words = ("out of memory", "can't allocate memory", "memory may have run out")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
