"""The command line, one file a command.

What needs torch is imported by the function that uses it, so that help and mistakes answer at once.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO, cast

from .. import __version__
from ..host.terminal import display, flush_streams, open_streams, say
from ..presets import presets
from .mistakes import DONE, IMPOSSIBLE, answer, together

# Each command is the function `main(arguments)` of the file of its name.
COMMANDS = {
    "train": "[PRESET]             train a model",
    "prepare": "DATA                 tokenise a text once, for runs to come",
    "convert": "FOLDER|FILE          a model of another program as one of ours",
    "compare": "MODEL MODEL ...      train models on the same batches over seeds; a table and a report",
    "paper": "TABLE                a table of the MoE-Mamba paper, run again at a size of your choice",
    "report": "COMPARISON ...       comparisons that were run, on one page",
    "finetune": "RUN                  a model learns from conversations, by LoRA or wholly",
    "upcycle": "RUN                  a dense model as a mixture of experts that computes the same",
    "export": "RUN                  a model in the format of another program",
    "generate": "RUN                  continue a prompt",
    "chat": "RUN                  talk with a model, or write a text in turns, in the terminal",
    "serve": "RUN                  answer requests over HTTP as OpenAI's API does, with a page to look at",
    "eval": "RUN                  loss, perplexity and bits per byte on a text",
    "look": "RUN                  which experts each token of a text visits, and how steps and gates go",
    "info": "PRESET|RUN|FILE      layers, parameters, operations and memory of a model",
    "plan": "                     a scaling law from your comparisons, and by it which model to train",
    "doctor": "[PRESET|RUN|FILE]    versions, devices, and which backend each op uses and why",
}
PRINTS = {
    "generate",
    "chat",
    "eval",
    "look",
    "info",
    "plan",
    "doctor",
}  # what they print is all that they do: they end with their reader


def main() -> None:
    """Run the command of `sys.argv` and exit.

    0 done, 1 failed, 2 asked for the impossible, 130 interrupted (Ctrl-C), 75 (the system's "try again later") saved
    and stopped, because a scheduler said so with SIGTERM or SIGUSR1 or the terminal was closed (SIGHUP).
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("MOEMAMBA_DEBUG") == "1"
    open_streams()
    output = sys.stdout
    works = bool(arguments) and arguments[0] in COMMANDS and arguments[0] not in PRINTS
    sys.stdout = cast(TextIO, display(needed=not works))
    try:
        status = _status(arguments, debug)
    finally:
        sys.stdout = output
        flush_streams()
    if status != DONE:
        sys.exit(status)


def _status(arguments: Sequence[str], debug: bool) -> int:
    """Run a command, say what went wrong, and return the exit status."""
    try:
        try:
            run(arguments)
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        found = answer(error)
        if found is None or (debug and isinstance(error, Exception) and not isinstance(error, BrokenPipeError)):
            raise
        status, sentence = found
        if sentence:
            say(f"moemamba: {sentence}")
        return status
    return DONE


def run(arguments: Sequence[str]) -> None:
    """One command; raises what it raises, and SystemExit after help."""
    if arguments[:1] == ["--"]:  # keeps `torchrun -m moemamba -- train --run ...` from reading our options
        arguments = arguments[1:]
    name, *rest = arguments or ["--help"]
    if name == "help" and rest[:1] and rest[0] in COMMANDS:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "--help-all", "help"):
        print(_overview())
    elif name == "--version":
        print(__version__)
    elif name == "--completion":
        from .completion import script

        print(script(rest[0] if rest else "", COMMANDS))
    elif name in COMMANDS:
        _alone(name, rest)
        import_module(f".{name}", __name__).main(rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        known = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"there is no command {name!r}; {known}")


def _alone(name: str, rest: Sequence[str]) -> None:
    """Refuse commands that several processes would each carry out; raises ValueError in the first of them."""
    if name == "train" or not together() or {"-h", "--help", "--help-all"} & set(rest):
        return
    if os.environ["RANK"] != "0":
        sys.exit(IMPOSSIBLE)
    raise ValueError(
        f"{name} works in one process, but {os.environ['WORLD_SIZE']} were started (WORLD_SIZE); start it without "
        "torchrun; only train works in several"
    )


def _overview() -> str:
    lines = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: moemamba COMMAND [options]\n\n{lines}\n\nmoemamba COMMAND --help says more about one.\n"
        "moemamba --completion bash|zsh|fish prints what makes the shell complete names.\n"
        f"Presets: {', '.join(presets())}."
    )
