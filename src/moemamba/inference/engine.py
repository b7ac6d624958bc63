"""One engine for all decoding: requests come and go, and each step makes a token of every one that is live."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import LAYERS
from ..model import MoEMamba
from ..state import State
from .choosing import Chooser
from .config import Sampling
from .evaluation import expect_numbers, in_evaluation
from .graph import Stepper, capturable, fingerprint
from .prefill import alike, joined, read
from .scheduler import Part, Scheduler
from .slots import Slots
from .stopping import Ending, Stops

CHECK = 32  # steps after which the last is looked at on a GPU: what is not finite stays so, in the state
PIECE = 2048  # positions of one prompt in a step, which bounds the memory of long prompts


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, one at least.
        max_new_tokens: most tokens to add, one at least.
        seed: seed and number of the sample, which make its draws repeatable; None draws from torch's generator.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: Stops = field(default_factory=Stops)
    seed: tuple[int, int] | None = None


class Event(NamedTuple):
    """What a step made of a request."""

    request: int
    token: int | None
    """the new token; None for one that completes a stop"""
    kept: int | None = None
    """once the request has ended, how many of its tokens come before what ended it"""


class _Run:
    """A request on its way."""

    def __init__(self, number: int, request: Request):
        self.number, self.request, self.ending = number, request, Ending(request.stops)
        self.sampling, self.seed = request.sampling, request.seed
        self.state: State | None = None  # of what has been read of its prompt
        self.launched = 0  # tokens that were asked for
        self.count = 0  # tokens that are known
        self.seated, self.ended = True, False  # whether it still has a slot, or waits for one

    @property
    def position(self) -> int:
        """In its sequence, of the token that is chosen next."""
        return len(self.request.prompt) + self.launched

    @property
    def left(self) -> int:
        """Tokens that may still be asked for."""
        return self.request.max_new_tokens - self.launched


class _Outlook:
    """What a step asks of the live requests, counted on while they stay the same: there may be hundreds."""

    def __init__(self, live: Sequence[_Run]):
        self.runs = tuple(live)
        self.most, self.least = max(run.left for run in live), min(run.left for run in live)
        self.greedy = all(run.sampling.temperature == 0 for run in live)

    def launch(self) -> None:
        """Each gets a token more."""
        self.most, self.least = self.most - 1, self.least - 1


class _Flight(NamedTuple):
    """Tokens that a GPU may still be computing."""

    runs: tuple[_Run, ...]
    tokens: Tensor
    largest: Tensor | None
    """(b,) of each row's output, where it is to be checked"""
    ready: "torch.cuda.Event | None"


class Engine:
    """Decodes with a model in evaluation mode, whatever mode it is in. One thread at a time may use it.

    On a GPU the step of the live rows is a CUDA graph, and the next step is launched before the tokens of the last are
    read, so that their events come one call of `step` later.

    Args:
        model: it may be trained in the meantime; after its modules, hooks or the places of its parameters have changed,
            `renew` has to be told.
        slots: requests that are decoded at once; others wait.
        chunk: prompt positions in a step, which bounds the time between two tokens of the others; no bound if None.
    """

    def __init__(self, model: MoEMamba, slots: int = 16, chunk: int | None = None):
        self._scheduler = Scheduler(slots, chunk or slots * PIECE, PIECE)
        self._numbers = count()
        self._runs: dict[int, _Run] = {}
        self._model: MoEMamba | None = None
        self._made: tuple[object, ...] | None = None
        self.renew(model)

    @property
    def busy(self) -> bool:
        """Whether there are events to come."""
        return bool(self._runs)

    @property
    def slots(self) -> int:
        """Requests that are decoded at once."""
        return self._scheduler.slots

    @property
    def captures(self) -> bool:
        """Whether steps are CUDA graphs, which are worth keeping."""
        return self._ahead

    def renew(self, model: MoEMamba) -> None:
        """Go on with a model as it is now; graphs are made anew if they no longer fit it. No request may be under way.

        Raises:
            RuntimeError: there are requests under way.
        """
        if self._runs:
            raise RuntimeError("the engine has requests under way; let them finish, or abort them, before renewing it")
        self._model = view = in_evaluation(model)
        self._device = view.embedding.weight.device
        captures = capturable(view)
        made = (self._device, captures, fingerprint(view) if captures or self._device.type == "cpu" else None)
        if made != self._made:
            self._made = made
            letters = [letter for layers in view.config.layers for letter in layers]
            kinds = [LAYERS[letter] for letter in letters if LAYERS[letter].state_type is not None]
            self._rows = Slots(kinds, self.slots, self._device)
            self._stepper = Stepper(self._rows, captures, padded=captures)
            self._ahead = captures
        self._live: list[_Run] = []  # row by row
        self._outlook: _Outlook | None = None  # of the live rows as they are
        self._chooser: Chooser | None = None  # likewise
        self._flights: list[_Flight] = []
        self._steps = 0

    def rest(self) -> None:
        """Forget the model, so that it can be freed; `renew` goes on."""
        self._model = None

    def submit(self, request: Request) -> int:
        """Queue a request; events carry the number that is returned.

        Raises:
            ValueError: an empty prompt, or no token wanted.
        """
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; a request needs 1 or more")
        number = next(self._numbers)
        self._scheduler.add(number, len(request.prompt))
        self._runs[number] = _Run(number, request)
        if self._ahead:
            self._rows.reserve(len(request.prompt) + request.max_new_tokens)  # graphs stay as they are
        return number

    @torch.inference_mode()
    def abort(self, *numbers: int) -> None:
        """Give up requests, which may have ended already; no event of them comes after this."""
        runs = [run for run in (self._runs.pop(number, None) for number in numbers) if run is not None]
        for run in runs:
            run.ended = True
        self._release(runs)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """A token of every live request, and a chunk of the prompts that are to be read.

        Raises:
            FloatingPointError: the model's output is not finite. All requests are aborted then, as by any other error.
        """
        try:
            return self._step()
        except BaseException:
            self.abort(*self._runs)
            raise

    def _step(self) -> list[Event]:
        earlier, self._flights = self._flights, []
        parts = self._scheduler.plan()
        if self._live:
            self._decode()
        if parts:
            self._read(parts)
        if not self._ahead:
            earlier, self._flights = self._flights, []
        events = [event for flight in earlier for event in self._land(flight)]
        self._release([run for flight in earlier for run in flight.runs if run.ended])
        return events

    def _decode(self) -> None:
        """Launch the next token of the live rows."""
        assert self._model is not None
        if self._outlook is None:
            self._outlook = _Outlook(self._live)
        runs, left = self._outlook.runs, self._outlook.most
        greedy = self._ahead and self._outlook.greedy
        hidden, logits = self._stepper.step(self._model, greedy, left)
        if logits is not None:
            if self._chooser is None:
                self._chooser = Chooser(runs, left, self._model.config.vocab_size, self._device)
            self._rows.tokens[: len(runs)] = self._chooser(logits)
        self._steps += 1
        looks = not self._ahead or self._steps % CHECK == 0 or self._outlook.least == 1
        output = logits if not self._ahead and logits is not None else hidden
        self._outlook.launch()
        self._launch(runs, self._rows.tokens[: len(runs)], output if looks else None)

    def _read(self, parts: list[Part]) -> None:
        """Read parts of prompts, and launch the first token of those that end."""
        assert self._model is not None
        ended: list[_Run] = []
        outputs, states = [], []
        for group in alike(parts):
            runs = [self._runs[part.request] for part in group]
            rows = [run.request.prompt[part.first : part.last] for run, part in zip(runs, group, strict=True)]
            before = [run.state for run in runs if run.state is not None]
            hidden, state = read(self._model, rows, joined(self._rows.kinds, before) if before else None)
            for place, (run, part) in enumerate(zip(runs, group, strict=True)):
                run.state = None if part.ends else state.select(slice(place, place + 1))
            last = [place for place, part in enumerate(group) if part.ends]
            ended += [runs[place] for place in last]
            every = len(last) == len(group)
            outputs.append(hidden if every else hidden[last])
            states.append(state if every else state.select(last))
        if not ended:
            return
        logits = self._model.head(torch.cat(outputs))
        tokens = Chooser(ended, 1, self._model.config.vocab_size, self._device)(logits)
        for state, own in zip(states, tokens.split([len(each) for each in outputs]), strict=True):
            if len(own):
                self._rows.put(state, own)
        self._live += ended
        self._outlook = self._chooser = None
        self._launch(tuple(ended), tokens, logits)

    def _launch(self, runs: tuple[_Run, ...], tokens: Tensor, output: Tensor | None) -> None:
        """Send for tokens that are computed, and let go who has all that it wanted."""
        for run in runs:
            run.launched += 1
        largest = None if output is None else output.amax(-1)
        ready = None
        if self._device.type == "cuda":
            tokens = _fetched(tokens)
            largest = None if largest is None else _fetched(largest)
            ready = torch.cuda.Event()
            ready.record()
        else:
            tokens = tokens.clone()  # the next step overwrites them
        self._flights.append(_Flight(runs, tokens, largest, ready))
        self._release([run for run in runs if run.launched == run.request.max_new_tokens])

    def _land(self, flight: _Flight) -> list[Event]:
        """The events of tokens that have been launched."""
        if flight.ready is not None:
            flight.ready.synchronize()
        if flight.largest is not None:
            expect_numbers(flight.largest, max(run.count for run in flight.runs))
        events = []
        for run, token in zip(flight.runs, flight.tokens.tolist(), strict=True):
            if run.ended:
                continue  # launched before its end was known
            run.count = count = run.count + 1
            run.ended = stopped = run.ending.push(token)
            kept = None
            if not stopped and count == run.request.max_new_tokens:
                run.ending.finish()
                run.ended = True
            if run.ended:
                kept = count if run.ending.kept is None else run.ending.kept
                del self._runs[run.number]
            events.append(Event(run.number, None if stopped else token, kept))
        return events

    def _release(self, runs: Iterable[_Run]) -> None:
        """Free the slots of requests that need them no longer."""
        leaving = [run for run in runs if run.seated]
        if not leaving:
            return
        for run in leaving:
            run.seated = False
            self._scheduler.finish(run.number)
        rows = [row for row, run in enumerate(self._live) if not run.seated]
        for new, old in self._rows.drop(rows):
            self._live[new] = self._live[old]
        del self._live[self._rows.live :]
        self._outlook = self._chooser = None


def _fetched(tensor: Tensor) -> Tensor:
    """On its way to the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
