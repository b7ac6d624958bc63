"""Reading prompts: parts of several at once, padded on the left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layers import Choice
from ..layers.layer import Layer
from ..model import MoEMamba
from ..state import State
from .cache import Snapshot, StateCache
from .request import Reading, Run, Score
from .scheduler import Part, Scheduler

LITTLE = 512  # positions of padding that cost less than another call
SCORED = 128  # positions whose logits are held at once


class Read(NamedTuple):
    """What parts of several prompts left."""

    hidden: Tensor
    """(b, l, d) what the head sees; of a shorter row the last positions"""
    state: State
    load: tuple[Tensor, ...]
    """of each router (e,) choices that fell on each expert"""


@dataclass
class Group:
    """Parts of prompts that are read as one batch."""

    parts: list[Part]
    runs: list[Run]
    """whose prompts these are, row by row"""
    tokens: Tensor
    """(b, l), padded on the left"""
    seq_idx: Tensor | None
    """(b, l), -1 at padding; None without any"""
    state: State | None
    """before them; None: they begin"""
    record: list[Choice] | None
    """where choices of experts go, (b, l, k), if somebody asked for them"""
    found: Read | None = None

    @property
    def count(self) -> int:
        """Positions, without padding."""
        return sum(part.last - part.first for part in self.parts)


class Ready(NamedTuple):
    """Requests whose prompts have been read."""

    runs: list[Run]
    hidden: Tensor
    """(b, d) what the head sees next"""
    state: State
    """of as many rows"""

    def select(self, rows: list[int]) -> "Ready":
        """Some of them."""
        if rows == [*range(len(self.runs))]:
            return self
        return Ready([self.runs[row] for row in rows], self.hidden[rows], self.state.select(rows))


class Reader:
    """Reads prompts, each from where it is known, and keeps what may be asked for again.

    Who has the same prompt as another that is being read waits for it, and shares what it leaves.

    Attributes:
        load: of each router (e,) choices of prompts that fell on each expert; none before the first prompt.
    """

    def __init__(self, model: MoEMamba, scheduler: Scheduler, kinds: Sequence[type[Layer]], cache: StateCache | None):
        self.model, self.kinds, self.cache = model, kinds, cache
        self.load: list[Tensor] = []
        self._scheduler = scheduler
        self._leaders: dict[Any, Run] = {}

    def admit(self, runs: Mapping[int, Run]) -> None:
        """Give out free slots."""
        for number in self._scheduler.admit():
            self._begin(runs[number])

    def leave(self, run: Run) -> None:
        """A request goes, perhaps before its prompt has been read: who waited for it reads by itself."""
        if self._leaders.get(run.key) is run:
            del self._leaders[run.key]
        waiting, run.followers = run.followers, []
        for other in waiting:
            if not other.ended:
                self._begin(other, held=True)

    def gather(self, parts: Sequence[Part], runs: Mapping[int, Run]) -> list[Group]:
        """What has to be read of parts of prompts."""
        return [
            self._group(group, [runs[part.request] for part in group])
            for group in alike([part for part in parts if part.first < part.last])
        ]

    def read(self, parts: Sequence[Part], groups: Sequence[Group], runs: Mapping[int, Run]) -> list[Ready]:
        """Read the groups that parts make and that have not been read; returns what prompts at their end have left."""
        ready = [self._read(group) for group in groups]
        for part in parts:
            if part.first == part.last:  # all of it was known
                run = runs[part.request]
                assert run.state is not None
                ready.append(Ready([run], run.hidden, run.state))
        ready = [each for each in ready if each.runs]
        shared = [self._shared(each) for each in ready]
        ready += [each for each in shared if each.runs]
        for each in ready:
            for place, run in enumerate(each.runs):
                self._finish(run, each, place)
        return ready

    def _begin(self, run: Run, held: bool = False) -> None:
        request, start = run.request, run.request.start
        run.state, run.hidden, run.cached = None, None, 0
        if start is not None:
            run.state, run.hidden = start.state, start.hidden[None]
        if request.whole:
            if start is not None and request.prompt_logprobs is not None and request.prompt:
                run.scores = score_prompt(self.model, start.hidden[None], request.prompt[:1], request.prompt_logprobs)
            run.saves = frozenset([len(request.prompt)]) if self.cache is not None else frozenset()
            self._scheduler.begin(run.number, 0)
            return
        if (leader := self._leaders.setdefault(run.key, run)) is not run:
            leader.followers.append(run)
            if not held:
                self._scheduler.hold(run.number)
            return
        cuts: tuple[int, ...] = ()
        if self.cache is not None:
            run.cached, snapshot, cuts = self.cache.find(*run.key)
            if snapshot is not None:
                run.state, run.hidden, run.snapshot = snapshot.state, snapshot.hidden[None], snapshot
        run.saves = frozenset(cuts)
        self._scheduler.begin(run.number, run.cached, cuts)

    def _group(self, parts: list[Part], own: list[Run]) -> Group:
        rows = [run.key[1][part.first : part.last] for run, part in zip(own, parts, strict=True)]
        longest, device = max(map(len, rows)), self.model.embedding.weight.device
        tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
        seq_idx = None
        if any(len(row) < longest for row in rows):
            marks = [[-1] * (longest - len(row)) + [0] * len(row) for row in rows]
            seq_idx = torch.tensor(marks, device=device)
        like = next((run.state for run in own if run.state is not None), None)
        before = None
        if like is not None:  # who begins goes on from nothing, so that weights are read once for all
            nothing = State(
                tuple(kind.allocate(1, 0, each) for kind, each in zip(self.kinds, like.mixers, strict=True))
            )
            before = joined(self.kinds, [run.state or nothing for run in own])
        return Group(parts, own, tokens, seq_idx, before, [] if any(run.request.routing for run in own) else None)

    def _read(self, group: Group) -> Ready:
        """What a group leaves."""
        if group.found is None:
            hidden, state, router = self.model.backbone(group.tokens, group.state, group.seq_idx, group.record)
            group.found = Read(hidden, state, tuple(stats.load for stats in router))
        found = group.found
        self.load = [a + b for a, b in zip(self.load, found.load, strict=True)] if self.load else list(found.load)
        for place, (run, part) in enumerate(zip(group.runs, group.parts, strict=True)):
            self._note(run, part, place, found, group.record)
            run.state = None if part.ends else found.state.select(slice(place, place + 1))
        everyone = Ready(group.runs, found.hidden[:, -1], found.state)
        return everyone.select([place for place, part in enumerate(group.parts) if part.ends])

    def _note(self, run: Run, part: Part, place: int, found: Read, record: list[Choice] | None) -> None:
        """Keep what is asked for of a part."""
        request, length = run.request, part.last - part.first
        if request.prompt_logprobs is not None:
            targets = request.prompt[part.first + 1 : part.last + 1]
            hidden = found.hidden[place, -length:][: len(targets)]
            run.scores += score_prompt(self.model, hidden, targets, request.prompt_logprobs)
        if request.routing and record is not None:
            run.records.append(routing_of(record, place, length))
        asked = part.ends and request.keep
        if not asked and part.last not in run.saves:
            return
        hidden = found.hidden[place, -1]
        if bool(hidden.isfinite().all()):
            snapshot = Snapshot(found.state.select([place]), hidden.clone(), *run.before(part.last))
            run.snapshot = snapshot if part.ends else None
            if self.cache is not None and part.last in run.saves:
                self.cache.put(run.key[0], run.key[1][: part.last], snapshot)

    def _shared(self, ready: Ready) -> Ready:
        """Those who waited for others."""
        pairs = [(place, other) for place, run in enumerate(ready.runs) for other in run.followers if not other.ended]
        for place, other in pairs:
            other.snapshot, other.cached = ready.runs[place].snapshot, len(other.request.prompt)
            self._scheduler.ready(other.number)
        for run in ready.runs:
            run.followers = []
        if not pairs:
            return ready.select([])
        places = [place for place, _ in pairs]
        return Ready([other for _, other in pairs], ready.hidden[places], ready.state.select(places))

    def _finish(self, run: Run, ready: Ready, place: int) -> None:
        """The prompt has been read."""
        if self._leaders.get(run.key) is run:
            del self._leaders[run.key]
        request = run.request
        if request.keep and run.snapshot is None:
            length = len(request.prompt)
            run.snapshot = Snapshot(ready.state.select([place]), ready.hidden[place].clone(), *run.before(length))
        if self.cache is not None or request.keep or request.whole or not request.max_new_tokens:
            run.reading = Reading(
                run.cached + (request.start.position if request.start else 0),
                run.scores if request.prompt_logprobs is not None else None,
                routing_joined(run.records) if request.routing else None,
                run.snapshot if request.keep else None,
            )
        run.state = run.hidden = run.snapshot = None


def alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that are read together: little or less than half of a group is padding."""
    groups: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: part.first - part.last):
        length = part.last - part.first
        if groups:
            longest = groups[-1][0]
            padding = longest.last - longest.first - length
            if padding <= length or padding * (len(groups[-1]) + 1) <= LITTLE:
                groups[-1].append(part)
                continue
        groups.append([part])
    return groups


def joined(kinds: Sequence[type[Layer]], states: Sequence[State]) -> State:
    """The rows of several states of layers of these kinds, one after the other."""
    mixers = zip(*(state.mixers for state in states), strict=True)
    return State(tuple(kind.join(each) for kind, each in zip(kinds, mixers, strict=True)))


def routing_of(record: Sequence[Choice], row: int, length: int) -> tuple[tuple[Any, Any], ...]:
    """Of each router (length, k) int16 experts and float32 gates of a row's last positions, as numpy arrays."""
    return tuple(
        (
            choice.indices[row, -length:].to("cpu", torch.int16).numpy(),
            choice.gates[row, -length:].to("cpu", torch.float32).numpy(),
        )
        for choice in record
    )


def routing_joined(parts: Sequence[tuple[tuple[Any, Any], ...]]) -> tuple[tuple[Any, Any], ...]:
    """The routing of a prompt from that of its parts."""
    return tuple(
        tuple(np.concatenate(pieces) for pieces in zip(*router, strict=True))  # type: ignore[misc]
        for router in zip(*parts, strict=True)
    )


def score(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """How likely tokens (n,) are by logits (n, v): (n,) their log-probabilities, and (n, most) the best and whose."""
    logprobs = logits.float().log_softmax(-1)
    top, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], top, ids


def score_prompt(model: MoEMamba, hidden: Tensor, targets: Sequence[int], most: int) -> list[Score]:
    """hidden (n, d) at the positions before the targets; the logits of a few positions are held at once."""
    found: list[Score] = []
    for first in range(0, len(targets), SCORED):
        tokens = torch.tensor(targets[first : first + SCORED], device=hidden.device)
        logits = model.head(hidden[first : first + len(tokens)])
        found += scores(*score(logits, tokens, most))
    return found


def scores(values: Tensor, top: Tensor, ids: Tensor) -> list[Score]:
    """From tensors to what a request is told."""
    each = zip(values.tolist(), top.tolist(), ids.tolist(), strict=True)
    return [Score(value, tuple(zip(own, best, strict=True))) for value, best, own in each]
