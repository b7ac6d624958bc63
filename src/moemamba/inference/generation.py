"""Continue prompts: one prefill, then one token at a time, in constant time and memory each."""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from operator import index
from typing import Any, overload

import torch
from torch import Tensor

from ..model import MoEMamba
from ..state import State
from ..text import Tokenizer
from .captured import capturable, claim
from .config import Sampling
from .draws import Draws
from .evaluation import expect_numbers, in_evaluation
from .sampling import sample
from .stopping import Ending, Stop, read_stops

PREFILL = 2048  # prompt positions in one call, which bounds the memory of long prompts
WORTHWHILE = 8  # tokens from which on a step is captured on a GPU, which takes about as long as a few steps

Stops = Stop | Collection[Stop]
Seed = int | Sequence[int] | None


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[int],
    max_new_tokens: int = ...,
    *,
    stop: Stops = ...,
    seed: Seed = ...,
    tokenizer: Tokenizer | None = ...,
    **sampling: Any,
) -> list[int]: ...


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = ...,
    *,
    stop: Stops = ...,
    seed: Seed = ...,
    tokenizer: Tokenizer | None = ...,
    **sampling: Any,
) -> list[list[int]]: ...


def generate(
    model: MoEMamba,
    prompts: Any,
    max_new_tokens: int = 128,
    *,
    stop: Stops = (),
    seed: Seed = None,
    tokenizer: Tokenizer | None = None,
    **sampling: Any,
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
    rows = _plain(prompts)
    if isinstance(rows, str | bytes | dict) or not hasattr(rows, "__iter__"):
        raise ValueError(f"prompts is {str(rows)[:40]!r}; expected token ids, which a tokenizer's encode makes of text")
    rows = [_plain(row) for row in rows]
    single = isinstance(rows[0], int) if rows else getattr(prompts, "ndim", 1) == 1
    batch = [rows] if single else rows
    stops = read_stops(stop, model.config.vocab_size, tokenizer)
    results, endings = [list[int]() for _ in batch], [Ending(stops) for _ in batch]
    for tokens in _stream(model, batch, max_new_tokens, Sampling(**sampling), endings, seed):
        for result, token in zip(results, tokens, strict=True):
            if token is not None:
                result.append(token)
    for result, ending in zip(results, endings, strict=True):
        ending.finish()
        del result[len(result) if ending.kept is None else ending.kept :]
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
    stop: Stops = (),
    seed: Seed = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[list[int | None]]:
    """As `generate` for a batch, yielding each step's token for every row; None for rows that have stopped.

    The token that completes a stop is not yielded. Of a stop of several tokens those before it have been by then.
    """
    stops = read_stops(stop, model.config.vocab_size, tokenizer)
    yield from _stream(model, prompts, max_new_tokens, sampling, [Ending(stops) for _ in prompts], seed)


def _stream(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    endings: list[Ending],
    seed: Seed,
) -> Generator[list[int | None]]:
    """`stream`, telling `endings`, one a row, of the tokens."""
    for number, prompt in enumerate(prompts):
        _check_prompt(number, prompt, model.config.vocab_size)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    seeds = None if seed is None else _seeds(_plain(seed), len(prompts))
    if not prompts or max_new_tokens == 0:
        return
    with closing(_steps(model, prompts, max_new_tokens, sampling, endings, seeds)) as steps:
        while True:
            with torch.inference_mode():  # not while the caller has its turn, who may train
                step = next(steps, None)
            if step is None:
                return
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


def _steps(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    endings: list[Ending],
    seeds: list[tuple[int, int]] | None,
) -> Generator[list[int | None]]:
    """`_stream`, of what has been checked."""
    view = in_evaluation(model)
    device = view.embedding.weight.device
    draws = None
    if seeds is not None and sampling.temperature > 0:
        draws = Draws(seeds, list(map(len, prompts)), max_new_tokens, view.config.vocab_size, device)
    hidden, state = _prefill(view, prompts, device)
    if max_new_tokens >= WORTHWHILE and capturable(view):
        yield from _captured(view, hidden, state, max_new_tokens, sampling, endings, draws, owner=model)
        return
    live, chosen = list(range(len(prompts))), hidden.new_empty(0)
    for count in range(max_new_tokens):
        if count:
            hidden, state, _ = view.backbone(chosen[:, None], state)
        logits = view.head(hidden[:, -1])
        expect_numbers(logits, count)
        chosen = sample(logits, sampling, _drawn(draws, count))
        step: list[int | None] = [None] * len(prompts)
        going = []
        for place, (row, token) in enumerate(zip(live, chosen.tolist(), strict=True)):
            if not endings[row].push(token):
                step[row] = token
                going.append(place)
        if not going:
            return
        yield step
        if len(going) < len(live):
            live = [live[place] for place in going]
            keep = torch.tensor(going, device=device)
            chosen, state = chosen[keep], state.select(keep)
            if draws is not None:
                draws.select(keep)


def _captured(
    model: MoEMamba,
    hidden: Tensor,
    state: State,
    count: int,
    sampling: Sampling,
    endings: list[Ending],
    draws: Draws | None,
    owner: MoEMamba | None = None,
) -> Iterator[list[int | None]]:
    """`stream` from the prompt's hidden states on, each token but the first by a CUDA graph; rows that have stopped run
    along until all have."""
    logits = model.head(hidden[:, -1])
    expect_numbers(logits, 0)
    first = sample(logits, sampling, _drawn(draws, 0))

    def choose(logits: Tensor, step: int) -> Tensor:
        return sample(logits, sampling, _drawn(draws, step))

    with claim(model, state, count, sampling.temperature == 0, owner or model) as decoder:
        for tokens in decoder.tokens(first, count, choose):
            step = [
                token if ending.kept is None and not ending.push(token) else None
                for ending, token in zip(endings, tokens, strict=True)
            ]
            if all(token is None for token in step):
                return
            yield step


def _drawn(draws: Draws | None, step: int) -> Tensor | None:
    return None if draws is None else draws.at(step)


def _prefill(model: MoEMamba, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, State]:
    """Hidden states whose last column is each prompt's last token (prompts are padded on the left), and the state."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    ragged = any(len(prompt) < longest for prompt in prompts)
    seq_idx = (
        torch.tensor([[-1] * (longest - len(prompt)) + [0] * len(prompt) for prompt in prompts], device=device)
        if ragged
        else None
    )
    state: State | None = None
    for start in range(0, longest, PREFILL):
        part = slice(start, start + PREFILL)
        hidden, state, _ = model.backbone(tokens[:, part], state, None if seq_idx is None else seq_idx[:, part])
    assert state is not None
    return hidden, state
