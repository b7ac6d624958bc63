"""`moemamba chat`: a conversation, or a text written in turns, in the terminal."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..host.terminal import say, visible
from ..inference.config import Sampling
from ..reading import validate
from .loading import Loading
from .options import Merged, Place, Positional
from .terminal import parse, show

if TYPE_CHECKING:
    from ..inference import Engine
    from ..serving.openai.templates import Template
    from ..text import Tokenizer

HELP = (
    ("/undo", "take the last turn back"),
    ("/fork NAME", "keep this place under a name"),
    ("/go NAME", "go to a place that was kept; without a name, list them"),
    ("/routing", "which experts the tokens of the last answer visited, in each layer"),
    ("/new", "begin anew"),
    ("/help", "this list"),
    ("/quit", "leave, as Ctrl-D does; Ctrl-C ends an answer"),
)
SHOWN = 40  # tokens of an answer whose routing is listed


@dataclass(frozen=True)
class Chat:
    """Talk with a model that has a chat template; with another, write a text in turns. /help lists what one can do."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    max_new_tokens: int = 400
    """tokens of an answer at most"""
    sampling: Merged[Sampling] = field(default_factory=Sampling)
    seed: int | None = None
    """a number that makes answers repeatable; another each time if None"""
    system: str | None = None
    """a message that begins each conversation and says how to answer; for models with a chat template"""
    chat_template: Place | None = None
    """a Jinja file that makes a prompt of a conversation; that of the model if None"""
    loading: Merged[Loading] = field(default_factory=Loading)

    def __post_init__(self) -> None:
        validate(self, positive=("max_new_tokens",), not_negative=("seed",))


@dataclass(frozen=True)
class Turns:
    """A place in a conversation, as a value."""

    messages: tuple[dict[str, str], ...] = ()
    ids: tuple[int, ...] = ()
    """of a text that is written in turns"""
    answered: int = 0
    """tokens of the last answer, at the end"""
    before: "Turns | None" = None


class Talk:
    """Takes lines, and shows answers as they come. What was read is not read again: the engine keeps its state.

    Args:
        write: shows a piece of an answer.
    """

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "Tokenizer",
        asked: Chat,
        template: "Template | None",
        names: Sequence[str],
        write: Callable[[str], object],
    ):
        self._engine, self._tokenizer, self._asked, self._template = engine, tokenizer, asked, template
        self._names, self._write = names, write
        self._first = Turns(({"role": "system", "content": asked.system},)) if asked.system else Turns()
        self._now, self._kept = self._first, dict[str, Turns]()
        self._ids: tuple[int, ...] = ()  # of all up to the end of the last answer

    def take(self, line: str) -> bool:
        """One line of a user; False if it was the last."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._answer(line)
        elif word == "/quit":
            return False
        elif (command := getattr(self, f"_{word[1:]}", None)) and word in {each.split()[0] for each, _ in HELP}:
            command(rest.strip())
        else:
            say(f"there is no {word}; /help lists what there is")
        return True

    def _answer(self, line: str) -> None:
        now = self._now
        if self._template is None:
            ids = (*now.ids, *self._tokenizer.encode(line)) or (self._tokenizer.end_of_text,)
            messages = now.messages
        else:
            messages = (*now.messages, {"role": "user", "content": line})
            ids = tuple(self._template.encode(messages))
        text, new = self._said(ids)
        self._ids = (*ids, *new)
        messages = (*messages, {"role": "assistant", "content": text}) if self._template else messages
        self._now = Turns(messages, self._ids, len(new), now)

    def _said(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Show an answer; its text and tokens, also of one that was interrupted."""
        from ..inference import Request
        from ..inference.stopping import Stops
        from ..serving.openai.answers import Choice

        asked, ends = self._asked, frozenset([self._tokenizer.end_of_text])
        choice = Choice(self._tokenizer, ids[-16:], (), ends)
        seed = None if asked.seed is None else (asked.seed, 0)
        number = self._engine.submit(Request(ids, asked.max_new_tokens, asked.sampling, Stops(ends), seed))
        said = ""
        try:
            while self._engine.busy:
                for event in self._engine.step():
                    choice.push(event)
                piece, _ = choice.take()
                said += piece
                self._write(piece)
        except KeyboardInterrupt:
            self._engine.abort(number)
        if choice.failure:
            raise FloatingPointError(choice.failure)
        self._write("\n")
        return said, choice.ids

    def _undo(self, _: str) -> None:
        if self._now.before is None:
            say("there is no turn to take back")
            return
        self._now = self._now.before
        self._ids = self._now.ids

    def _fork(self, name: str) -> None:
        if not name:
            say("give the place a name: /fork NAME")
            return
        self._kept[name] = self._now
        say(f"kept as {name}; /go {name} comes back here")

    def _go(self, name: str) -> None:
        if name not in self._kept:
            say(f"places that were kept: {', '.join(self._kept) or 'none yet; /fork NAME keeps one'}")
            return
        self._now = self._kept[name]
        self._ids = self._now.ids

    def _new(self, _: str) -> None:
        self._now, self._ids = self._first, ()

    def _help(self, _: str) -> None:
        show(HELP)
        what = "a line continues the text, an empty one goes on" if self._template is None else "a line is a message"
        say(f"anything else: {what}")

    def _routing(self, _: str) -> None:
        from ..inference import Request

        if not self._names or not self._now.answered:
            say("this model has no router" if not self._names else "there is no answer yet")
            return
        self._engine.submit(Request(self._ids, 0, routing=True))
        (event,) = [event for _ in iter(lambda: self._engine.busy, False) for event in self._engine.step()]
        assert event.reading is not None and event.reading.routing is not None
        first = len(self._ids) - min(self._now.answered, SHOWN)
        rows = [
            [
                repr(self._tokenizer.spelling(token).decode(errors="replace"))[1:-1],
                *("+".join(map(str, experts[place])) for experts, _ in event.reading.routing),
            ]
            for place, token in enumerate(self._ids)
            if place >= first
        ]
        show(rows, ["token", *(name.split(".")[1] for name in self._names)])


def main(arguments: Sequence[str]) -> None:
    asked = parse(Chat, arguments, "chat")
    from ..checkpoint import find_model
    from ..host.files import expanded
    from ..inference import Engine, StateCache
    from ..serving.openai.templates import find_template
    from ..serving.refusal import Refusal

    folder = find_model(expanded(asked.run))
    model, tokenizer = asked.loading.load(folder)
    template = find_template(folder, asked.chat_template, tokenizer)
    if asked.system and template is None:
        raise ValueError("--system needs a model with a chat template, or --chat-template FILE")
    show_as = visible if sys.stdout.isatty() else str

    def write(piece: str) -> None:
        print(show_as(piece), end="", flush=True)

    engine = Engine(model.requires_grad_(False), 1, 512, cache=StateCache(256 << 20))
    talk = Talk(engine, tokenizer, asked, template, model.router_names, write)
    if sys.stdin.isatty():
        say("a message, or /help" if template else "this model has no chat template: write a text in turns, or /help")
    for line in iter(_lines(), None):
        try:
            if not talk.take(line):
                break
        except (Refusal, ValueError) as error:  # of this line alone: what was said before stays
            say(str(error))
        except KeyboardInterrupt:
            say("")


def _completed(text: str, number: int) -> str | None:
    """Of the commands that begin so, the one with this number; None after the last."""
    found = [word for each, _ in HELP if text and (word := each.split()[0]).startswith(text)]
    return found[number] if number < len(found) else None


def _lines() -> Callable[[], str | None]:
    """Lines of standard input, with a prompt and a history on a terminal; None at the end."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        from contextlib import suppress

        with suppress(ImportError):
            import readline  # arrows and history

            readline.set_completer_delims("")
            readline.set_completer(_completed)
            readline.parse_and_bind("tab: complete")

    def line() -> str | None:
        while True:
            try:
                return input(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                say("")

    return line
