"""Completions and answers in conversations, whole or as they come, in OpenAI's form."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from ...inference import Reading, Request, Snapshot
from ...inference.stopping import Stops
from ..refusal import Refusal, failed, invalid
from ..service import News, Service
from .answers import LOWEST, Choice, Token, logprobs, prompt_tokens
from .bodies import Asked, Chat, Completion, prompts_of
from .templates import NONE

LONG = 20_000
"""characters of a text from which on it is made into tokens beside the event loop"""
PING = 15.0
"""seconds without a token after which a stream shows that it is alive"""
TAIL = 16


class Job:
    """Choices of one request on their way: what is asked of the engine, and what is told of it.

    Args:
        prompts: tokens of each prompt.
        texts: texts that end an answer.
    """

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, body: Asked, prompts: Sequence[list[int]], most: int):
        self.service, self.body, self.prompts = service, body, prompts
        self.kept = None if body.state is None else service.states.get(body.state)
        self.start: Snapshot | None = None if self.kept is None else self.kept.snapshot
        for ids in prompts:
            service.check_prompt(ids, most, self.start)
        if len(prompts) * body.n > service.limits.max_choices:
            limit = service.limits.max_choices
            raise invalid(f"{len(prompts)} prompts times n = {body.n} are more than the {limit} answers of a request")
        self.most = most
        self.id = service.name_of(self.prefix)
        self.created = int(time.time())
        self.endings = body.endings(service.tokenizer.end_of_text, service.vocabulary)
        self.choices: list[Choice] = []
        self.cached = [0] * len(prompts)
        self._began = time.monotonic()
        self._last = [self._began] * (len(prompts) * body.n)
        self._echoed: dict[int, tuple[str, list[Token]]] = {}

    @property
    def scored(self) -> int | None:
        """Most likely tokens beside each, if tokens are scored."""
        raise NotImplementedError

    @property
    def echo(self) -> bool:
        """Whether the prompt is a part of the answer."""
        return False

    async def requests(self) -> list[Request]:
        """For the engine, prompt by prompt."""
        body, service = self.body, self.service
        count = len(self.prompts) * body.n
        constraints = await service.grammars.following(body.response_format, service.vocabulary, count)
        stops = Stops(self.endings, texts=body.stops, tokenizer=service.tokenizer)
        sampling, bias = body.sampling, body.bias(service.vocabulary)
        found = []
        for place in range(count):
            prompt, sample = divmod(place, body.n)
            ids = self.prompts[prompt]
            found.append(
                Request(
                    ids,
                    self.most,
                    sampling,
                    stops,
                    service.seed(body.seed, sample),
                    bias,
                    self.scored,
                    self.scored if self.echo and sample == 0 else None,
                    start=self.start,
                    constraint=constraints[place],
                )
            )
            before = [*(self.start.tail if self.start else ()), *ids][-TAIL:]
            echoed = len(service.tokenizer.decode(ids)) if self.echo else 0
            self.choices.append(Choice(service.tokenizer, before, body.stops, self.endings, echoed))
        return found

    def see(self, news: News) -> None:
        """Take in what steps made, and measure."""
        metrics = self.service.metrics
        for place, event, when in news:
            choice = self.choices[place]
            if choice.sampled == 0 and event.failure is None:
                metrics.first_token.see(when - self._began)
            elif event.token is not None:
                metrics.between_tokens.see(when - self._last[place])
            self._last[place] = when
            choice.push(event)
            if event.reading is not None and place % self.body.n == 0:
                self.cached[place // self.body.n] = event.reading.cached

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens there were; those of a state that was gone on from are of the prompt, and cached."""
        before = 0 if self.start is None else self.start.position
        prompt = sum(before + len(ids) for ids in self.prompts)
        new = sum(choice.sampled for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached)},
        }

    def end(self) -> None:
        """All of it was answered."""
        metrics = self.service.metrics
        metrics.whole.see(time.monotonic() - self._began)
        metrics.prompt_tokens.add(sum(map(len, self.prompts)))
        metrics.generation_tokens.add(sum(choice.sampled for choice in self.choices))
        for choice in self.choices:
            metrics.success.add(finished_reason=choice.finish or "error")

    async def extras(self, place: int) -> dict[str, Any]:
        """What a choice that has ended carries besides: its tokens, its state, its routing.

        State and routing are read once more, from where they are known: on a CPU that gives the same to the bit.
        """
        body, choice = self.body, self.choices[place]
        found: dict[str, Any] = {}
        if body.return_token_ids:
            found["token_ids"] = choice.ids
        if not (body.return_state or body.return_routed_experts):
            return found
        ids = [*self.prompts[place // body.n], *choice.ids]
        request = Request(ids, 0, start=self.start, keep=body.return_state, routing=body.return_routed_experts)
        (reading,) = await self.service.read([request], beyond=True)
        if reading.snapshot is not None:
            parent = None if self.kept is None else self.kept.id
            found["state"] = self.service.states.add(reading.snapshot, parent).id
        if reading.routing is not None:
            found["routing"] = routing_shown(self.service, reading)
        return found

    def echoed(self, place: int) -> tuple[str, list[Token]]:
        """A choice's prompt, with what its tokens scored once that is known."""
        prompt = place // self.body.n
        if prompt not in self._echoed:
            reading = self.choices[prompt * self.body.n].reading
            scores = [] if reading is None else reading.scores or []
            self._echoed[prompt] = prompt_tokens(self.prompts[prompt], scores, self.service.tokenizer)
        return self._echoed[prompt]

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An answer or a piece of one."""
        service = self.service
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": service.name,
            "choices": choices,
            "system_fingerprint": service.fingerprint,
        }

    def ready(self, place: int) -> bool:
        """Whether all is known that a choice begins with: its prompt may be scored with another."""
        leader = self.choices[place - place % self.body.n]
        return not self.echo or self.scored is None or leader.reading is not None or leader.failure is not None

    def begin(self, place: int) -> dict[str, Any] | None:
        """The piece that a choice begins with, if it begins with one."""
        return None

    def piece(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A piece of a choice."""
        raise NotImplementedError

    def full(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError


class Continued(Job):
    """`POST /v1/completions`."""

    body: Completion

    @property
    def scored(self) -> int | None:
        return self.body.logprobs

    @property
    def echo(self) -> bool:
        return self.body.echo

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self.scored is None else logprobs(tokens, self.service.spelling)

    def begin(self, place: int) -> dict[str, Any] | None:
        if not self.echo:
            return None
        text, tokens = self.echoed(place)
        return {"index": place, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": None}

    def piece(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        finish = self.choices[place].finish
        return {"index": place, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def full(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.echo:
            before, own = self.echoed(place)
            text, tokens = before + text, [*own, *tokens]
        return self.piece(place, text, tokens)


class Spoken(Job):
    """`POST /v1/chat/completions`."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    body: Chat

    @property
    def scored(self) -> int | None:
        return (self.body.top_logprobs or 0) if self.body.logprobs else None

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.scored is None:
            return None
        return {"content": [self._scored(each) for each in tokens], "refusal": None}

    def _scored(self, token: Token) -> dict[str, Any]:
        assert token.score is not None
        top = [self._entry(each, value) for each, value in token.score.top]
        return {**self._entry(token.id, token.score.logprob), "top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        spelled = self.service.tokenizer.spelling(token)
        return {"token": self.service.spelling(token), "logprob": max(value, LOWEST), "bytes": list(spelled)}

    def begin(self, place: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        finish = self.choices[place].finish
        delta = {"content": text} if text or finish is None else {}
        return {"index": place, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def full(self, place: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        finish = self.choices[place].finish
        return {"index": place, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}


async def encoded(service: Service, prompt: str | list[int]) -> list[int]:
    """The tokens of a prompt; raises Refusal where the tokenizer cannot make any."""
    if isinstance(prompt, list):
        return prompt
    try:
        if len(prompt) > LONG:
            return await asyncio.to_thread(service.tokenizer.encode, prompt)
        return service.tokenizer.encode(prompt)
    except ValueError as error:
        raise invalid(str(error), "prompt") from error


async def continued(service: Service, body: Completion) -> Continued:
    """What a body asks for; raises Refusal."""
    service.check_model(body.model)
    texts = prompts_of(body.prompt)
    if len(texts) * body.n > service.limits.max_choices:
        raise invalid(f"{len(texts)} prompts times n = {body.n} are too many; ask for fewer at once", "prompt")
    prompts = [await encoded(service, each) for each in texts]
    if body.state is None:  # a text from nothing begins after the end of one
        prompts = [ids or [service.tokenizer.end_of_text] for ids in prompts]
    return Continued(service, body, prompts, body.max_tokens)


async def spoken(service: Service, body: Chat) -> Spoken:
    """What a body asks for; raises Refusal."""
    service.check_model(body.model)
    if service.template is None:
        raise invalid(NONE, "messages", "no_chat_template")
    if not body.messages:
        raise invalid("messages is empty; give one at least", "messages")
    ids = await asyncio.to_thread(service.template.encode, body.messages)
    most = body.max_completion_tokens or body.max_tokens or min(1024, service.limits.max_tokens)
    return Spoken(service, body, [ids], most)


async def answer(job: Job) -> dict[str, Any]:
    """The whole answer; raises Refusal."""
    with job.service.follow(await job.requests()) as following:
        while following.left:
            job.see(await following.some(ended=True))
    if failure := next((choice.failure for choice in job.choices if choice.failure), None):
        raise failed(failure)
    choices = []
    for place, choice in enumerate(job.choices):
        choices.append({**job.full(place, *choice.take()), **await job.extras(place)})
    job.end()
    return {**job.object(job.whole, choices), "usage": job.usage}


async def pieces(job: Job, requests: Sequence[Request]) -> AsyncIterator[bytes]:
    """The answer as server-sent events. An error on the way is one too."""
    begun: set[int] = set()
    held: list[int] = []
    taken = False
    with_usage = {"usage": None} if job.body.with_usage else {}
    frame = _written({**job.object(job.part, []), **with_usage})
    before, after = (b"data: " + frame).rsplit(b"[]", 1)  # what all pieces have in common is written once
    before, after = before + b"[", b"]" + after + b"\n\n"
    try:
        with job.service.follow(requests) as following:
            taken = True
            yield b""
            while following.left:
                events = await following.some(PING)
                if not events:
                    yield b": ping\n\n"
                    continue
                job.see(events)
                sent: list[bytes] = []
                places = dict.fromkeys([*held, *(place for place, *_ in events)])
                held = [place for place in places if not job.ready(place)]
                for place in places:
                    for choice in [] if place in held else await _parts(job, place, begun):
                        sent += before, _written(choice), after
                if sent:
                    yield b"".join(sent)
    except Refusal as error:
        if not taken:
            raise
        yield _event(error.body)
        return
    job.end()
    if job.body.with_usage:
        yield _event({**job.object(job.part, []), "usage": job.usage})
    yield b"data: [DONE]\n\n"


async def _parts(job: Job, place: int, begun: set[int]) -> list[dict[str, Any]]:
    """What is new of a choice; raises Refusal if it has failed."""
    choice, found = job.choices[place], []
    if choice.failure is not None:
        raise failed(choice.failure)
    if place not in begun and (first := job.begin(place)) is not None:
        found.append(first)
    begun.add(place)
    text, tokens = choice.take()
    if text or tokens or choice.ended:
        extras = await job.extras(place) if choice.ended else {}
        found.append({**job.piece(place, text, tokens), **extras})
    return found


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _written(values: dict[str, Any]) -> bytes:
    return _ENCODER.encode(values).encode()


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + _written(values) + b"\n\n"


def routing_shown(service: Service, reading: Reading) -> dict[str, Any]:
    """Which experts tokens have visited, as base64 of little-endian arrays of the shape (tokens, layers, k).

    A layer of fewer choices than others has -1 for those that it has not.
    """
    routing = reading.routing or ()
    length = len(routing[0][0]) if routing else 0
    shape = length, len(routing), max((own.shape[1] for own, _ in routing), default=0)
    experts, gates = np.full(shape, -1, "<i2"), np.zeros(shape, "<f2")
    for layer, (own, weights) in enumerate(routing):
        experts[:, layer, : own.shape[1]], gates[:, layer, : own.shape[1]] = own, weights
    return {
        "layers": list(service.model.router_names),
        "n_experts": [each.count for each in service.model.config.routers],
        "shape": list(shape),
        "experts": base64.b64encode(experts.tobytes()).decode(),
        "gates": base64.b64encode(gates.tobytes()).decode(),
    }
