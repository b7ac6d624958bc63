"""Continue prompts: one prefill, then one token at a time, in constant time and memory each."""

import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from operator import index
from typing import Any, Unpack, overload
from weakref import ref

from torch import Tensor

from ..model import MoEMamba
from ..text import Tokenizer
from .config import Sampling, SamplingOptions
from .engine import Engine
from .request import Event, Request
from .stopping import Stop, Stops, read_stops

Given = Stop | Collection[Stop]
Seed = int | Sequence[int] | None


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[int],
    max_new_tokens: int = ...,
    *,
    stop: Given = ...,
    seed: Seed = ...,
    tokenizer: Tokenizer | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> list[int]: ...


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = ...,
    *,
    stop: Given = ...,
    seed: Seed = ...,
    tokenizer: Tokenizer | None = ...,
    **sampling: Unpack[SamplingOptions],
) -> list[list[int]]: ...


def generate(
    model: MoEMamba,
    prompts: Any,
    max_new_tokens: int = 128,
    *,
    stop: Given = (),
    seed: Seed = None,
    tokenizer: Tokenizer | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Any:
    """Continue one prompt or a batch of prompts of any lengths. The model's mode, training or not, makes no difference.

    Args:
        prompts: token ids of one prompt, or a batch: lists of ids, or a tensor (b, l) int64.
        max_new_tokens: most tokens to add to each.
        stop: what ends a row, and is left out of the result with all that follows: a token, a sequence of tokens, a
            text, or a collection of these. A list of numbers is several tokens, each of which ends a row; a list in
            that list is a sequence. A text may begin or end within a token; such a token is left out as well.
        seed: makes sampling repeatable. A row then depends on nothing but its prompt, the seed and its place in the
            batch; with a list, a seed for each row, not even on its place.
        tokenizer: reads texts in `stop`.
        **sampling: fields of `Sampling`: temperature (0 is greedy), top_k, top_p, min_p.
    Returns:
        the new tokens: a list for one prompt, a list of lists for a batch. A row's result does not depend on the
        others, but for what rounding in another batch may change; without a seed its randomness does.
    Raises:
        ValueError: an empty prompt, a token that the model does not know, a stop that can never come, or a value out
            of range.
        FloatingPointError: the model's output is not finite.
    """
    for name in sampling.keys() - SamplingOptions.__annotations__.keys():
        options = ", ".join(SamplingOptions.__annotations__)
        raise TypeError(f"generate() has no option {name}; for sampling there are {options}")
    rows = _plain(prompts)
    if isinstance(rows, str | bytes | dict) or not hasattr(rows, "__iter__"):
        raise ValueError(f"prompts is {str(rows)[:40]!r}; expected token ids, which a tokenizer's encode makes of text")
    rows = [_plain(row) for row in rows]
    single = isinstance(rows[0], int) if rows else getattr(prompts, "ndim", 1) == 1
    batch = [rows] if single else rows
    stops = read_stops(stop, model.config.vocab_size, tokenizer)
    results = [list[int]() for _ in batch]
    for events in _events(model, batch, max_new_tokens, Sampling(**sampling), stops, seed):
        for row, token, kept, *_ in events:
            if token is not None:
                results[row].append(token)
            if kept is not None:
                del results[row][kept:]
    return results[0] if single else results


def _plain(values: Any) -> Any:
    """Of a tensor or an array its values as Python's."""
    return values.tolist() if hasattr(values, "tolist") else values


def stream(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: Given = (),
    seed: Seed = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[list[int | None]]:
    """As `generate` for a batch, yielding each step's token for every row; None for rows that have stopped.

    The token that completes a stop is not yielded. Of a stop of several tokens those before it have been by then.
    """
    stops = read_stops(stop, model.config.vocab_size, tokenizer)
    queues: dict[int, deque[int]] = {row: deque() for row in range(len(prompts))}  # of rows that go on, or have some
    ended = set[int]()
    with closing(_events(model, prompts, max_new_tokens, sampling, stops, seed)) as steps:
        for events in steps:
            for row, token, kept, *_ in events:
                if token is not None:
                    queues[row].append(token)
                if kept is not None:
                    ended.add(row)
            for row in [row for row in ended if not queues.get(row, True)]:
                del queues[row]
            while queues and all(queues.values()):  # short prompts are read sooner, and may be ahead
                step: list[int | None] = [None] * len(prompts)
                for row, queue in list(queues.items()):
                    step[row] = queue.popleft()
                    if not queue and row in ended:
                        del queues[row]
                yield step


def _check_prompt(number: int, prompt: Any, vocab_size: int) -> None:
    if not hasattr(prompt, "__len__") or isinstance(prompt, str | bytes):
        raise ValueError(f"prompt {number} is {prompt!r:.40}; expected its token ids")
    if not len(prompt):
        raise ValueError(f"prompt {number} has no tokens; begin with at least one, such as the end-of-text token")
    for kind in set(map(type, prompt)):
        if not hasattr(kind, "__index__"):
            raise ValueError(f"prompt {number} holds {kind.__name__}; expected token ids, which are whole numbers")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt {number} has the token {token}; this model's tokens are 0 to {vocab_size - 1}")


def _seeds(seed: int | Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(seed, sample) of each row."""
    if isinstance(seed, Sequence) and len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} values for {rows} prompts; give one for each, or a single number")
    pairs = [(each, 0) for each in seed] if isinstance(seed, Sequence) else [(seed, row) for row in range(rows)]
    try:
        found = [(index(each), sample) for each, sample in pairs]
    except TypeError:
        raise ValueError(f"seed is {seed!r}; it must be a whole number, or one for each row") from None
    for each, _ in found:
        if not 0 <= each < 1 << 64:
            raise ValueError(f"seed is {each}; it must be 0 or more and less than 2^64")
    return found


def _events(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stops: Stops,
    seed: Seed,
) -> Generator[list[Event]]:
    """What each step of an engine makes of all prompts; requests bear the numbers of their rows."""
    for number, prompt in enumerate(prompts):
        _check_prompt(number, prompt, model.config.vocab_size)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    seeds = [None] * len(prompts) if seed is None else _seeds(_plain(seed), len(prompts))
    if not prompts or max_new_tokens == 0:
        return
    with _engine(model, len(prompts)) as engine:
        requests = [
            Request(prompt, max_new_tokens, sampling, stops, own) for prompt, own in zip(prompts, seeds, strict=True)
        ]
        rows = {engine.submit(request): row for row, request in enumerate(requests)}
        try:
            while engine.busy:
                events = engine.step()
                if failed := next((event.failure for event in events if event.failure), None):
                    raise FloatingPointError(failed)
                yield [event._replace(request=rows[event.request]) for event in events]
        finally:
            engine.abort(*rows)


class _Kept(threading.local):
    """The engine of a thread's last call on a GPU, so that generating again captures nothing.

    It goes with its model. Who uses several models in turns makes an `Engine` for each.
    """

    def __init__(self) -> None:
        self.idle: list[tuple[ref[MoEMamba], Engine]] = []  # one, unless it is in use


_kept = _Kept()


@contextmanager
def _engine(model: MoEMamba, rows: int) -> Iterator[Engine]:
    """An engine for so many rows: on a GPU the one that this thread has used last, if it is of the model."""
    idle = _kept.idle
    engine = next((engine for known, engine in idle if known() is model and engine.slots >= rows), None)
    idle.clear()  # nobody else may use it in the meantime, and its memory is free before the next one takes its own
    if engine is None:
        engine = Engine(model, rows)
    else:
        engine.renew(model)
    try:
        yield engine
    finally:
        if engine.captures:
            engine.rest()
            idle[:] = [(ref(model, lambda _: idle.clear()), engine)]
