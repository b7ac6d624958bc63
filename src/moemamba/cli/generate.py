"""`moemamba generate`: the text is printed as it comes; of many prompts answers are written in their order."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..host.files import expanded
from ..host.terminal import visible
from ..inference.config import Sampling
from ..reading import validate
from .loading import Loading
from .options import Merged, Place, Positional, Repeated
from .terminal import parse

if TYPE_CHECKING:
    from ..model import MoEMamba
    from ..serving.openai.answers import Choice
    from ..text import Tokenizer

AHEAD = 4  # prompts per slot that are read ahead, so that no slot waits
LONGEST = 16 << 20  # characters of a line of prompts


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, printing the text as it comes; or continue many, and write the answers in their order."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    prompt: str | None = None
    """text to continue; - is standard input, and so is no prompt at all where that is not a terminal"""
    prompts: Place | None = None
    """a file of prompts, one a line; - is standard input. Lines of a .jsonl file, and of standard input with --json,
    are JSON: a text, or an object that has one as prompt"""
    json: bool = False
    """write one JSON object a line for each answer"""
    samples: int = 1
    """answers to each prompt"""
    slots: int = 16
    """answers that are written at once, where there are many"""
    max_new_tokens: int = 400
    """tokens to write at most; the end of a document ends the text before"""
    sampling: Merged[Sampling] = field(default_factory=Sampling)
    seed: int | None = None
    """a number that makes the text repeatable; another each time if None"""
    stop: Repeated[tuple[str, ...]] = ()
    """a text that ends the answer and is not printed; give the option again for more than one"""
    loading: Merged[Loading] = field(default_factory=Loading)

    def __post_init__(self) -> None:
        validate(self, positive=("samples", "slots"))
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("give --prompt or --prompts, not both")

    @property
    def several(self) -> bool:
        """Whether answers are written one after another."""
        return self.prompts is not None or self.json or self.samples > 1


def main(arguments: Sequence[str]) -> None:
    asked = parse(Generate, arguments, "generate")
    if "" in asked.stop:
        raise ValueError("--stop is an empty text, which would end every answer at once; leave it out")
    prompt = asked.prompt
    if asked.prompts is None:
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.read()
        prompt = _expect_text(prompt or "", "the prompt")
    model, tokenizer = asked.loading.load(asked.run)
    if asked.several:
        _write_all(asked, model, tokenizer, prompt)
    else:
        _write(asked, model, tokenizer, prompt or "")


def _expect_text(text: str, what: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes out of place
        raise ValueError(f"{what} is not UTF-8 text; convert it, for instance with iconv -t utf-8")
    return text


def _write(asked: Generate, model: "MoEMamba", tokenizer: "Tokenizer", prompt: str) -> None:
    """One answer, as it comes."""
    from ..inference import stream
    from ..text import StreamDecoder, UntilText

    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    text, until = StreamDecoder(tokenizer, ids[-16:]), UntilText(asked.stop)
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


@dataclass
class _Answer:
    """On its way."""

    prompt: str
    sample: int
    choice: "Choice"


def _write_all(asked: Generate, model: "MoEMamba", tokenizer: "Tokenizer", prompt: str | None) -> None:
    """Many answers, each once those before it are written."""
    if asked.seed is not None and not 0 <= asked.seed < 1 << 64:
        raise ValueError(f"seed is {asked.seed}; it must be 0 or more and less than 2^64")
    writer = _Writer(asked, model, tokenizer)
    with _opened(asked.prompts) as lines:
        prompts = iter([prompt or ""]) if lines is None else _prompts(lines, asked)
        for number, text in enumerate(prompts):
            for sample in range(asked.samples):
                writer.begin(text, number, sample)
                while writer.full:
                    writer.step()
    while writer.order:
        writer.step()


class _Writer:
    """Answers on their way.

    Attributes:
        order: those that are not written yet, as they came.
    """

    def __init__(self, asked: Generate, model: "MoEMamba", tokenizer: "Tokenizer"):
        from ..inference import Engine

        self._asked, self._tokenizer = asked, tokenizer
        self._engine = Engine(model, asked.slots, 64 * asked.slots)
        self._show = visible if sys.stdout.isatty() else str
        self._under_way: dict[int, _Answer] = {}
        self.order: deque[_Answer] = deque()

    @property
    def full(self) -> bool:
        """Whether no slot would be free for another prompt soon."""
        return len(self._under_way) >= AHEAD * self._asked.slots or len(self.order) >= 64 * AHEAD * self._asked.slots

    def begin(self, text: str, number: int, sample: int) -> None:
        """Queue a sample of an answer to a prompt."""
        from ..inference import Request
        from ..inference.stopping import Stops
        from ..serving.openai.answers import Choice

        asked, ends = self._asked, frozenset([self._tokenizer.end_of_text])
        ids = self._tokenizer.encode(text) or [self._tokenizer.end_of_text]
        answer = _Answer(text, sample, Choice(self._tokenizer, ids[-16:], asked.stop, ends))
        self.order.append(answer)
        if not asked.max_new_tokens:
            answer.choice.finish = "length"
            return
        seed = None if asked.seed is None else (asked.seed, number * asked.samples + sample)
        stops = Stops(ends, texts=asked.stop, tokenizer=self._tokenizer)
        request = Request(ids, asked.max_new_tokens, asked.sampling, stops, seed)
        self._under_way[self._engine.submit(request)] = answer

    def step(self) -> None:
        """One step, and what can be written after it."""
        for event in self._engine.step() if self._engine.busy else ():
            self._under_way[event.request].choice.push(event)
            if event.kept is not None:
                del self._under_way[event.request]
        while self.order and self.order[0].choice.ended:
            _print(self.order.popleft(), self._asked, self._show)


def _print(answer: _Answer, asked: Generate, show: Callable[[str], str]) -> None:
    choice = answer.choice
    if choice.failure is not None:
        raise FloatingPointError(choice.failure)
    text, _ = choice.take()
    if asked.json:
        said: dict[str, Any] = {"prompt": answer.prompt, "text": text, "finish_reason": choice.finish}
        said |= {"tokens": len(choice.ids)} | ({"sample": answer.sample} if asked.samples > 1 else {})
        print(json.dumps(said, ensure_ascii=False), flush=True)
    else:
        print(show(f"{answer.prompt}{text}\n"), flush=True)


def _opened(prompts: str | None) -> Any:
    if prompts is None:
        return nullcontext(None)
    return (
        nullcontext(sys.stdin) if prompts == "-" else expanded(prompts).open(encoding="utf-8", errors="surrogateescape")
    )


def _prompt_of(text: str) -> Any:
    """Of a line of JSON its prompt; None if it is no JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get("prompt") if isinstance(value, dict) else value


def _prompts(lines: Any, asked: Generate) -> Iterator[str]:
    """The prompts of a file, one after the other; raises ValueError with the line of one that is none."""
    as_json = str(asked.prompts).endswith(".jsonl") or (asked.json and asked.prompts == "-")
    for number, line in enumerate(iter(lambda: lines.readline(LONGEST + 1), ""), 1):
        where = f"line {number} of {asked.prompts}"
        if len(line) > LONGEST:
            raise ValueError(f"{where} has more than {LONGEST:,} characters; cut it")
        text: Any = line.removesuffix("\n").removesuffix("\r")
        if as_json and not text.strip():
            continue
        if as_json:
            text = _prompt_of(text)
            if not isinstance(text, str):
                raise ValueError(f'{where} is no prompt; write "a text" in quotes, or {{"prompt": "a text"}}')
        yield _expect_text(text, where)
