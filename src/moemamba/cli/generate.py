"""`moemamba generate`: the text is printed as it comes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from ..host.terminal import visible
from ..inference.config import Sampling
from .options import Merged, Place, Positional, Repeated
from .terminal import parse


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, printing the text as it comes."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    prompt: str | None = None
    """text to continue; - is standard input, and so is no prompt at all where that is not a terminal"""
    max_new_tokens: int = 400
    """tokens to write at most; the end of a document ends the text before"""
    sampling: Merged[Sampling] = field(default_factory=Sampling)
    seed: int | None = None
    """a number that makes the text repeatable; another each time if None"""
    stop: Repeated[tuple[str, ...]] = ()
    """a text that ends the answer and is not printed; give the option again for more than one"""
    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Generate, arguments, "generate")
    prompt = asked.prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    prompt = prompt or ""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # bytes out of place
        raise ValueError("the prompt is not UTF-8 text; convert it, for instance with iconv -t utf-8")
    if "" in asked.stop:
        raise ValueError("--stop is an empty text, which would end every answer at once; leave it out")
    from ..checkpoint import load
    from ..inference import stream
    from ..text import StreamDecoder, UntilText

    model, tokenizer = load(asked.run, asked.device)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    text, until = StreamDecoder(tokenizer), UntilText(asked.stop)
    tokens = stream(model, [ids], asked.max_new_tokens, asked.sampling, stop=tokenizer.end_of_text, seed=asked.seed)
    begun = list(islice(tokens, 2))  # before anything is printed, since they may have to compile kernels, and say so
    show = visible if sys.stdout.isatty() else str  # to a file or a program every character goes as it is
    print(show(prompt), end="", flush=True)
    for (token,) in chain(begun, tokens):
        assert token is not None  # of a single row the stream ends with it
        print(show(until.push(text.push(token))), end="", flush=True)
        if until.found:
            break
    print(show(until.push(text.finish()) + until.finish()))
