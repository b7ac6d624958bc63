"""One engine for all decoding: requests come and go, and each step makes a token of every one that is live."""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import LAYERS
from ..model import MoEMamba
from .cache import Snapshot, StateCache
from .choosing import Chooser, Tilt
from .evaluation import NOT_FINITE, in_evaluation, why_varies
from .graph import Stepper, capturable, fingerprint
from .prefill import Group, Reader, score, scores
from .request import Event, Request, Run, Score
from .scheduler import Part, Scheduler
from .slots import Slots

CHECK = 32  # steps after which the last is looked at on a GPU: what is not finite stays so, in the state
PIECE = 2048  # positions of one prompt in a step, which bounds the memory of long prompts


class _Outlook:
    """What a step asks of the live requests, counted on while they stay the same: there may be hundreds."""

    def __init__(self, live: Sequence[Run]):
        self.runs = tuple(live)
        self.most, self.least = max(run.left for run in live), min(run.left for run in live)
        self.greedy = all(run.plain for run in live)
        self.scored = _scored(live)

    def launch(self) -> None:
        """Each gets a token more."""
        self.most, self.least = self.most - 1, self.least - 1


class _Flight(NamedTuple):
    """Tokens that a GPU may still be computing."""

    runs: tuple[Run, ...]
    tokens: Tensor
    largest: Tensor | None
    """(b,) of each row's output, where it is to be checked"""
    scored: list[int]
    """rows whose tokens are scored"""
    scores: tuple[Tensor, ...]
    """of those, as `score` returns them"""
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
        alone: the same while nobody else decodes; as `chunk` if None.
        gap: seconds below which a step may have more positions than `chunk`, as many as it has time for. On a CPU
            results do not depend on that.
        batch_invariant: refuse a model whose answers may depend on what else is computed (ValueError, with the reason).
        cache: keeps what prompts and answers leave, for others that begin alike.

    Attributes:
        generated: new tokens so far, of all requests.
        clock: what `gap` is measured with.
    """

    def __init__(
        self,
        model: MoEMamba,
        slots: int = 16,
        chunk: int | None = None,
        *,
        alone: int | None = None,
        gap: float | None = None,
        batch_invariant: bool = False,
        cache: StateCache | None = None,
    ):
        self._scheduler = Scheduler(slots, chunk or slots * PIECE, PIECE, alone, gap)
        self._numbers = count()
        self._runs: dict[int, Run] = {}
        self._model: MoEMamba | None = None
        self._made: tuple[object, ...] | None = None
        self.cache, self.generated, self._invariant = cache, 0, batch_invariant
        self.clock = time.perf_counter
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
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._scheduler.waiting

    @property
    def live(self) -> int:
        """Rows that are being decoded."""
        return self._rows.live

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return self._scheduler.free

    @property
    def load(self) -> list[Tensor]:
        """Of each router (e,) choices of prompts that fell on each expert; empty before the first prompt."""
        return self._reader.load

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
        if self._invariant and (reason := why_varies(model)):
            raise ValueError(f"batch_invariant does not hold here: {reason}")
        self._model = view = in_evaluation(model)
        self._device = view.embedding.weight.device
        captures = capturable(view)
        made = (self._device, fingerprint(view)) if captures else None
        if made is None or made != self._made:  # what else steps prepare may be of other weights
            self._made = made
            letters = [letter for layers in view.config.layers for letter in layers]
            kinds = [LAYERS[letter] for letter in letters if LAYERS[letter].state_type is not None]
            self._rows = Slots(kinds, self.slots, self._device)
            self._stepper = Stepper(self._rows, captures, padded=captures)
            self._ahead = captures
        if self.cache is not None:
            self.cache.clear()  # the weights may be others
        self._reader = Reader(view, self._scheduler, self._rows.kinds, self.cache)
        self._events: list[Event] = []  # of requests that only read
        self._latest: tuple[tuple[Run, ...], Tensor] | None = None  # of the last step, and what the head saw
        self._live: list[Run] = []  # row by row
        self._outlook: _Outlook | None = None  # of the live rows as they are
        self._chooser: Chooser | None = None  # likewise
        self._flights: list[_Flight] = []
        self._steps = 0

    def rest(self) -> None:
        """Forget the model, so that it can be freed; `renew` goes on."""
        self._model = None
        del self._reader

    def bind(self) -> None:
        """Make the calling thread one that may use the engine: what it launches goes to the model's GPU."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def submit(self, request: Request) -> int:
        """Queue a request; events carry the number that is returned.

        Raises:
            ValueError: an empty prompt, or a number of tokens that cannot be.
        """
        if request.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; it must be 0 or more")
        if not len(request.prompt) and request.start is None:
            raise ValueError("a request has a prompt of 0 tokens; it needs one at least")
        number = next(self._numbers)
        run = self._runs[number] = Run(number, request)
        assert self._model is not None
        run.tilt = Tilt.of(request.sampling, request.bias, self._model.config.vocab_size, self._device)
        self._scheduler.add(number, len(request.prompt))
        if self._ahead:
            self._rows.reserve(run.position + request.max_new_tokens)  # graphs stay as they are
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

        A request for which the model's output is not finite fails by itself. After any other error all are aborted.
        """
        try:
            return self._step()
        except BaseException:
            self._latest = None
            self.abort(*self._runs)
            raise

    def _step(self) -> list[Event]:
        began = self.clock()
        earlier, self._flights = self._flights, []
        events = []
        if earlier and any(run.constraint for run in self._live):  # what may come next depends on what came
            events, earlier = self._landed(earlier), []
        self._reader.admit(self._runs)
        parts = self._scheduler.plan()
        groups = self._reader.gather(parts, self._runs)
        if self._live:
            self._decode(groups)
        if parts:
            self._read(parts, groups)
        if not self._ahead:
            earlier, self._flights = self._flights, []
        events += self._landed(earlier)
        self._scheduler.took(self.clock() - began)
        if self._events:
            events, self._events = events + self._events, []
        return events

    def _decode(self, groups: list[Group]) -> None:
        """Launch the next token of the live rows, and read what prompts are cheaper to read with them."""
        assert self._model is not None
        if self._outlook is None:
            self._outlook = _Outlook(self._live)
        runs, left = self._outlook.runs, self._outlook.most
        greedy = self._ahead and self._outlook.greedy
        hidden, logits = self._stepper.step(self._model, greedy, left, groups)
        if logits is not None:
            if self._chooser is None:
                self._chooser = Chooser(runs, left, self._model.config.vocab_size, self._device)
            self._rows.tokens[: len(runs)] = self._chooser(logits)
        if self.cache is not None:
            self._latest = runs, hidden
        self._steps += 1
        looks = not self._ahead or self._steps % CHECK == 0 or self._outlook.least == 1
        output = logits if not self._ahead and logits is not None else hidden
        self._outlook.launch()
        self._launch(runs, self._rows.tokens[: len(runs)], output if looks else None, logits, self._outlook.scored)

    def _read(self, parts: list[Part], groups: list[Group]) -> None:
        """Read parts of prompts, and launch the first token of those that end."""
        assert self._model is not None
        ready = []
        for each in self._reader.read(parts, groups, self._runs):
            self._close([run for run in each.runs if not run.request.max_new_tokens], each.hidden, each.runs)
            ready.append(each.select([row for row, run in enumerate(each.runs) if run.request.max_new_tokens]))
        ready = [each for each in ready if each.runs]
        if not ready:
            return
        ended = [run for each in ready for run in each.runs]
        logits = self._model.head(torch.cat([each.hidden for each in ready]))
        tokens = Chooser(ended, 1, self._model.config.vocab_size, self._device)(logits)
        for each, own in zip(ready, tokens.split([len(each.runs) for each in ready]), strict=True):
            self._rows.put(each.state, own)
        self._live += ended
        self._outlook = self._chooser = None
        self._launch(tuple(ended), tokens, logits, logits, _scored(ended))

    def _close(self, only: list[Run], hidden: Tensor, runs: list[Run]) -> None:
        """End requests that only read."""
        for run in only:
            run.ended = True
            if not bool(hidden[runs.index(run)].isfinite().all()):
                run.failure, run.reading = NOT_FINITE.format(0), None
            self._events.append(Event(run.number, None, 0, reading=run.reading, failure=run.failure))
            del self._runs[run.number]
        self._release(only)

    def _launch(
        self,
        runs: tuple[Run, ...],
        tokens: Tensor,
        output: Tensor | None,
        logits: Tensor | None,
        scored: list[int],
    ) -> None:
        """Send for tokens that are computed, and let go who has all that it wanted."""
        for run in runs:
            run.launched += 1
        found: tuple[Tensor, ...] = ()
        if scored and logits is not None:
            most = max(runs[row].request.logprobs or 0 for row in scored)
            found = score(logits[scored], tokens[scored], most)
        largest = None if output is None else output.amax(-1)
        ready = None
        if self._device.type == "cuda":
            tokens, found = _fetched(tokens), tuple(map(_fetched, found))
            largest = None if largest is None else _fetched(largest)
            ready = torch.cuda.Event()
            ready.record()
        else:
            tokens = tokens.clone()  # the next step overwrites them
        self._flights.append(_Flight(runs, tokens, largest, scored, found, ready))
        self._release([run for run in runs if run.launched == run.request.max_new_tokens])

    def _landed(self, flights: list[_Flight]) -> list[Event]:
        """The events of tokens that have been launched; who has ended leaves."""
        events = [event for flight in flights for event in self._land(flight)]
        self._release([run for flight in flights for run in flight.runs if run.ended])
        return events

    def _land(self, flight: _Flight) -> list[Event]:
        if flight.ready is not None:
            flight.ready.synchronize()
        if flight.largest is not None and not math.isfinite(flight.largest.sum().item()):
            for run, finite in zip(flight.runs, flight.largest.isfinite().tolist(), strict=True):
                run.failure = None if finite else NOT_FINITE.format(len(run.produced))
        known = dict(zip(flight.scored, scores(*flight.scores), strict=True)) if flight.scored else {}
        events = []
        for row, (run, token) in enumerate(zip(flight.runs, flight.tokens.tolist(), strict=True)):
            if run.ended:
                continue  # launched before its end was known
            produced = run.produced
            if 0 < len(produced) < run.bare and run.failure is None:
                produced.append(token)  # most are so, and there may be hundreds
                events.append(Event(run.number, token))
            else:
                events.append(self._event(run, token, known.get(row)))
        self.generated += len(events)
        return events

    def _event(self, run: Run, token: int, found: Score | None) -> Event:
        """A request's next token is known."""
        if found is not None:
            found = found._replace(top=found.top[: run.request.logprobs])
        if run.failure is not None:
            run.ended = True
            del self._runs[run.number]
            return Event(run.number, None, len(run.produced), failure=run.failure)
        if run.constraint is not None:
            run.constraint.push(token)
        run.produced.append(token)
        count = len(run.produced)
        run.ended = stopped = run.ending.push(token)
        kept = None
        if not stopped and count == run.request.max_new_tokens:
            run.ending.finish()
            run.ended = True
        if run.ended:
            kept = count if run.ending.kept is None else run.ending.kept
            del self._runs[run.number]
        reading, run.reading = run.reading, None
        if stopped:
            return Event(run.number, None, kept, found, reading, ended_by=token)
        return Event(run.number, token, kept, found, reading)

    def _release(self, runs: Iterable[Run]) -> None:
        """Free the slots of requests that need them no longer."""
        leaving = [run for run in runs if run.seated]
        if not leaving:
            return
        for run in leaving:
            if self._latest is not None:
                self._remember(run, *self._latest)
            run.seated = False
            self._scheduler.finish(run.number)
            self._reader.leave(run)
        rows = [row for row, run in enumerate(self._live) if not run.seated]
        for new, old in self._rows.drop(rows):
            self._live[new] = self._live[old]
        del self._live[self._rows.live :]
        self._outlook = self._chooser = None

    def _remember(self, run: Run, runs: tuple[Run, ...], hidden: Tensor) -> None:
        """Keep what an answer leaves, for prompts that go on from it; where nothing runs ahead it is still there."""
        assert self.cache is not None
        if self._ahead or run.failure is not None or run not in runs or run not in self._live:
            return
        length = len(run.request.prompt) + run.launched - 1  # what its row has read
        tokens = [*run.key[1], *run.produced][:length]
        seen = hidden[runs.index(run)].clone()
        if bool(seen.isfinite().all()):
            state = self._rows.take(self._live.index(run))
            self.cache.put(run.key[0], tokens, Snapshot(state, seen, *run.before(length)))


def _scored(runs: Sequence[Run]) -> list[int]:
    """Rows whose tokens are scored."""
    return [row for row, run in enumerate(runs) if run.request.logprobs is not None]


def _fetched(tensor: Tensor) -> Tensor:
    """On its way to the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
