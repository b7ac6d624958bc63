"""A model that answers: what all requests share, on the side of the event loop."""

import asyncio
import hashlib
import json
import math
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

from .. import __version__
from ..inference import Engine, Event, Reading, Request, Snapshot, StateCache
from ..model import MoEMamba
from ..reading import to_dict
from ..text import Tokenizer
from .alarm import Alarm
from .config import Limits
from .metrics import Metrics
from .openai.answers import Spelling
from .openai.schema import Grammars
from .openai.templates import Template
from .refusal import busy, failed, invalid, late, unavailable
from .states import States
from .worker import Batch, Full, Ticket, Worker

News = list[tuple[int, Event, float]]
"""which of the requests, what a step made of it, and when, by the monotonic clock"""


class Following:
    """Requests that came together, as an event loop follows them. Who leaves early gives them up.

    What comes while nobody looks is given out at once: a slow reader gets fewer and larger pieces.

    Attributes:
        left: requests that have not ended.
    """

    def __init__(self, service: "Service", ticket: Ticket, count: int):
        self.left = count
        self._service, self._ticket = service, ticket
        self._events: News = []
        self._waiter: asyncio.Future[None] | None = None
        self._patient = False  # until a request ends
        self._deadline = time.monotonic() + service.limits.max_seconds
        self._alarm = Alarm(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._alarm.stop()
        self._service.leave(self._ticket, self.left > 0)

    def tell(self, place: int, event: Event, when: float) -> None:
        """An event of one of them."""
        self._events.append((place, event, when))
        if event.kept is not None or not self._patient:
            self._wake()

    async def some(self, patience: float = math.inf, ended: bool = False) -> News:
        """What has come since the last time; nothing after so many seconds without news.

        Args:
            ended: wait until a request has ended.
        Raises:
            Refusal: the requests take longer than they may.
        """
        self._patient = ended
        if not (any(event.kept is not None for _, event, _ in self._events) if ended else self._events):
            self._waiter = asyncio.get_running_loop().create_future()
            self._alarm.set(min(max(self._deadline - time.monotonic(), 0), patience))
            await self._waiter
        if time.monotonic() >= self._deadline:
            raise late(self._service.limits.max_seconds)
        found, self._events = self._events, []
        self.left -= sum(event.kept is not None for _, event, _ in found)
        return found

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Service:
    """A model, its tokenizer and its engine.

    Args:
        name: what clients call the model.
        checksums: of its weights, by tensor.
        template: of conversations, if the model has one.
    """

    def __init__(
        self,
        model: MoEMamba,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits,
        checksums: Mapping[str, int],
        template: Template | None = None,
    ):
        self.model, self.tokenizer, self.name, self.limits, self.template = model, tokenizer, name, limits, template
        self.created = int(time.time())
        self.fingerprint = _fingerprint(model, checksums)
        self.draining = False
        self._random = random.Random(secrets.randbits(256))  # asks the system once, not for each request
        self.metrics = Metrics()
        self.spelling = Spelling(tokenizer)
        self.grammars = Grammars(tokenizer)
        self.cache = StateCache(limits.cache_bytes)
        chunk, alone, gap = limits.chunk, limits.chunk_alone, limits.gap
        same = limits.batch_invariant
        engine = Engine(model, limits.slots, chunk, alone=alone, gap=gap, batch_invariant=same, cache=self.cache)
        self._followed: dict[Ticket, Following] = {}
        self._loop = asyncio.get_running_loop()
        self.worker = Worker(engine, self._deliver, limits.slots + limits.max_waiting)
        self.states = States(limits.state_bytes, limits.state_seconds, spell=tokenizer.decode)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has."""
        return self.model.config.vocab_size

    def check_model(self, name: str | None) -> None:
        """Raises Refusal if a request is for another model."""
        if name not in (None, self.name):
            raise invalid(f"there is no model {name!r:.80} here; this server has {self.name!r}", "model").of(
                404, "model_not_found"
            )

    def check_prompt(self, ids: Sequence[int], new: int, start: Snapshot | None) -> None:
        """Raises Refusal for tokens that the model does not have, or too many."""
        most = self.limits.max_prompt
        if len(ids) > most:
            message = f"the prompt has {len(ids):,} tokens, and {most:,} are the most here; shorten it"
            raise invalid(message, "prompt", "context_length_exceeded")
        if new > self.limits.max_tokens:
            message = f"max_tokens is {new:,}, and {self.limits.max_tokens:,} are the most here; ask for fewer"
            raise invalid(message, "max_tokens")
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            strange = next(each for each in ids if not 0 <= each < self.vocabulary)
            message = f"the prompt has the token {strange}; this model's tokens are 0 to {self.vocabulary - 1}"
            raise invalid(message, "prompt")
        if not ids and start is None:
            raise invalid("the prompt has no tokens; begin with at least one", "prompt")

    def follow(self, requests: Sequence[Request], beyond: bool = False) -> Following:
        """Run requests to their ends.

        Args:
            beyond: they go on from some that have just ended, so that there is room for them.
        Raises:
            Refusal: the queue is full, or the server is about to stop.
        """
        if self.draining and not beyond:
            raise unavailable("the server is about to stop; try again later", "draining")
        if len(requests) > self.worker.most:
            message = f"the request asks for {len(requests)} answers, and {self.worker.most} are the most here at once"
            raise invalid(f"{message}; ask for fewer")
        try:
            ticket = self.worker.submit(requests, beyond)
        except Full as error:
            self.metrics.refused.add()
            raise busy(str(error)) from error
        following = self._followed[ticket] = Following(self, ticket, len(requests))
        return following

    def leave(self, ticket: Ticket, early: bool) -> None:
        """Nobody follows these requests any more."""
        del self._followed[ticket]
        if early:
            self.worker.abort(ticket)

    async def read(self, requests: Sequence[Request], beyond: bool = False) -> list[Reading]:
        """What each of some requests that only read has found.

        Raises:
            Refusal: as `follow`, or one has failed.
        """
        found: dict[int, Reading] = {}
        with self.follow(requests, beyond) as following:
            while following.left:
                for place, event, _ in await following.some():
                    if event.reading is None:
                        raise failed(event.failure or "the prompt was not read")
                    found[place] = event.reading
        return [found[place] for place in range(len(requests))]

    async def drain(self, seconds: float) -> bool:
        """Answer what is under way and nothing more; False if it took too long."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._followed:
                    await asyncio.sleep(0.02)
        return not self._followed

    def close(self) -> None:
        """Stop the engine."""
        self.worker.close(10)

    def seed(self, asked: int | None, sample: int) -> tuple[int, int]:
        """Of a sample: what was asked for, or something that nobody knows before."""
        return (self._random.getrandbits(64) if asked is None else asked % (1 << 64)), sample

    def name_of(self, prefix: str) -> str:
        """A name for an answer, which no other has."""
        return f"{prefix}{self._random.getrandbits(96):024x}"

    def _deliver(self, batch: Batch) -> None:
        """From the worker's thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._tell, batch)

    def _tell(self, batch: Batch) -> None:
        now = time.monotonic()
        for ticket, place, event in batch:
            if (following := self._followed.get(ticket)) is not None:
                following.tell(place, event, now)


def _fingerprint(model: MoEMamba, checksums: Mapping[str, int]) -> str:
    """Of weights, configuration and version: states and seeds mean the same where it is the same."""
    said = json.dumps([to_dict(model.config), dict(sorted(checksums.items())), __version__], sort_keys=True)
    return "moemamba-" + hashlib.sha256(said.encode()).hexdigest()[:16]
