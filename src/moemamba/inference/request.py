"""What is asked of an engine, and what it answers. No torch is needed to ask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .config import Sampling
from .stopping import Ending, Stops

if TYPE_CHECKING:
    from ..state import State
    from .cache import Snapshot
    from .choosing import Tilt


class Constraint(Protocol):
    """What a text has to keep to, such as a JSON schema. One of these follows one request."""

    def allowed(self) -> Any:
        """(v,) bool numpy array: tokens that may come next, one at least."""

    def push(self, token: int) -> None:
        """The token that came."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue, or to read.

    Attributes:
        prompt: token ids, one at least; none if `start` is all that there is to continue.
        max_new_tokens: most tokens to add; 0 only reads.
        seed: seed and number of the sample, which make its draws repeatable; None draws from torch's generator.
        bias: added to the logits of some tokens.
        logprobs: score each new token, beside so many of the most likely ones.
        prompt_logprobs: the same for the tokens of the prompt, which is read whole for it.
        routing: record which experts the tokens of the prompt visit; it is read whole for it too.
        start: what came before the prompt.
        keep: return what the prompt leaves, to go on from.
        constraint: what the new tokens have to keep to.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: Stops = field(default_factory=Stops)
    seed: tuple[int, int] | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    routing: bool = False
    start: "Snapshot | None" = None
    keep: bool = False
    constraint: Constraint | None = None

    @property
    def whole(self) -> bool:
        """Whether every position of the prompt has to be computed, whatever is known."""
        return self.prompt_logprobs is not None or self.routing


class Score(NamedTuple):
    """How likely the model found a token."""

    logprob: float
    """natural logarithm of its probability, before temperature, penalties and bias"""
    top: tuple[tuple[int, float], ...] = ()
    """the most likely tokens and theirs, in order"""


class Reading(NamedTuple):
    """What reading a prompt gave besides its first token."""

    cached: int
    """positions that were known already, those of `Request.start` among them"""
    scores: list[Score] | None = None
    """of each token of the prompt but the first, and of that too after a start; if they were asked for"""
    routing: tuple[tuple[Any, Any], ...] | None = None
    """of each router, bottom to top: numpy arrays (l, k), int16 experts and float32 gates; if asked for"""
    snapshot: "Snapshot | None" = None
    """if it was asked for"""


class Event(NamedTuple):
    """What a step made of a request."""

    request: int
    token: int | None
    """the new token; None for one that completes a stop, and where there is none"""
    kept: int | None = None
    """once the request has ended, how many of its tokens come before what ended it"""
    score: Score | None = None
    """of the token, if it was asked for"""
    reading: Reading | None = None
    """with the first event of a request that asked for something of the kind, or that only reads"""
    failure: str | None = None
    """why the request ended early"""
    ended_by: int | None = None
    """the token that completes a stop"""


class Run:
    """A request on its way."""

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        # What its prompt continues, and the prompt.
        self.key = None if request.start is None else request.start.name, tuple(request.prompt)
        start = () if request.start is None else request.start.tail
        self.ending = Ending(request.stops, [*start, *request.prompt[-TAIL:]][-TAIL:])
        self.sampling, self.seed = request.sampling, request.seed
        # Tokens, after the first, of which there is no more to say than what they are.
        plain = self.ending.never and request.constraint is None and request.logprobs is None
        self.bare = request.max_new_tokens - 1 if plain else 0
        self.tilt: Tilt | None = None  # of its logits
        self.state: State | None = None  # of what has been read of its prompt
        self.hidden: Any = None  # (1, d) that the head sees next, where all of it is known
        self.cached = 0  # positions of the prompt that were known
        self.scores: list[Score] = []  # of the prompt
        self.records: list[tuple[tuple[Any, Any], ...]] = []  # routing of each part of the prompt
        self.reading: Reading | None = None  # to go with the first event
        self.saves: frozenset[int] = frozenset()  # lengths of prompt whose states are worth keeping
        self.snapshot: Snapshot | None = None  # of the whole prompt
        self.followers: list[Run] = []  # that wait for what it reads
        self.produced: list[int] = []  # tokens that are known
        self.launched = 0  # tokens that were asked for
        self.seated, self.ended = True, False  # whether it still has a slot, or waits for one
        self.failure: str | None = None

    @property
    def position(self) -> int:
        """In its sequence, of the token that is chosen next."""
        before = 0 if self.request.start is None else self.request.start.position
        return before + len(self.request.prompt) + self.launched

    @property
    def left(self) -> int:
        """Tokens that may still be asked for."""
        return self.request.max_new_tokens - self.launched

    @property
    def plain(self) -> bool:
        """Whether the most likely token is all that is asked for."""
        asked = self.request
        return self.sampling.temperature == 0 and not (self.tilt or asked.constraint or asked.logprobs is not None)

    @property
    def constraint(self) -> Constraint | None:
        """What its tokens have to keep to."""
        return self.request.constraint

    def before(self, length: int) -> tuple[int, tuple[int, ...]]:
        """Position and last tokens after so many of its own, the prompt's and then those that are known."""
        start, prompt = self.request.start, self.request.prompt
        first = max(length - TAIL, 0)
        own = [*prompt[first:length], *self.produced[max(first - len(prompt), 0) : max(length - len(prompt), 0)]]
        tail = (*(start.tail if start else ()), *own)[-TAIL:]
        return (start.position if start else 0) + length, tuple(tail)


TAIL = 16
"""last tokens that a text may depend on, where what follows is decoded by itself"""
