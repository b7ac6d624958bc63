"""Continue prompts: one prefill, then one token at a time, in constant time and memory each."""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..model import MoEMamba
from ..state import State
from .captured import capturable, claim
from .config import Sampling
from .sampling import sample

PREFILL = 2048  # prompt positions in one call, which bounds the memory of long prompts
WORTHWHILE = 8  # tokens from which on a step is captured on a GPU, which takes about as long as a few steps


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[int],
    max_new_tokens: int = ...,
    *,
    stop: Collection[int] = ...,
    seed: int | None = ...,
    **sampling: Any,
) -> list[int]: ...


@overload
def generate(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = ...,
    *,
    stop: Collection[int] = ...,
    seed: int | None = ...,
    **sampling: Any,
) -> list[list[int]]: ...


def generate(
    model: MoEMamba,
    prompts: Any,
    max_new_tokens: int = 128,
    *,
    stop: Collection[int] = (),
    seed: int | None = None,
    **sampling: Any,
) -> Any:
    """Continue one prompt or a batch of prompts of any lengths.

    Args:
        prompts: token ids of one prompt, or a batch: lists of ids, or a tensor (b, l) int64.
        max_new_tokens: most tokens to add to each.
        stop: a row ends when it produces one of these tokens, which is left out of the result.
        seed: makes sampling repeatable.
        **sampling: fields of `Sampling`: temperature (0 is greedy), top_k, top_p, min_p.
    Returns:
        the new tokens: a list for one prompt, a list of lists for a batch. With temperature 0 a row's result does not
        depend on the others.
    Raises:
        ValueError: an empty prompt, a token that the model does not know, or a value out of range.
    """
    rows = [_plain(row) for row in _plain(prompts)]
    single = isinstance(rows[0], int) if rows else getattr(prompts, "ndim", 1) == 1
    batch = [rows] if single else rows
    results: list[list[int]] = [[] for _ in batch]
    with _evaluating(list(model.modules())):
        for tokens in stream(model, batch, max_new_tokens, Sampling(**sampling), stop=stop, seed=seed):
            for result, token in zip(results, tokens, strict=True):
                if token is not None:
                    result.append(token)
    return results[0] if single else results


def _plain(values: Any) -> Any:
    """Of a tensor or an array its values as Python's."""
    return values.tolist() if hasattr(values, "tolist") else values


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Evaluation without gradients; afterwards each module's mode is what it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def stream(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """As `generate` for a batch, yielding each step's token for every row; None for rows that have stopped."""
    last = model.config.vocab_size - 1
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens; begin with at least one, such as the end-of-text token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token <= last:
                raise ValueError(f"prompt {index} has the token {token}; this model's tokens are 0 to {last}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must be 0 or more and less than 2^64")
    modules = list(model.modules())
    with closing(_steps(model, prompts, max_new_tokens, sampling, stop, seed)) as steps:
        while True:
            with _evaluating(modules):  # not while the caller has its turn, who may train or stream from it as well
                step = next(steps, None)
            if step is None:
                return
            yield step


def _steps(
    model: MoEMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Collection[int],
    seed: int | None,
) -> Generator[list[int | None]]:
    """`stream`, in a model that is in evaluation mode."""
    if not prompts or max_new_tokens == 0:
        return
    device = model.embedding.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    hidden, state = _prefill(model, prompts, device)
    if max_new_tokens >= WORTHWHILE and capturable(model):
        yield from _captured(model, hidden, state, max_new_tokens, sampling, stop, generator)
        return
    live, chosen = list(range(len(prompts))), hidden.new_empty(0)
    for count in range(max_new_tokens):
        if count:
            hidden, state, _ = model.backbone(chosen[:, None], state)
        chosen = sample(model.head(hidden[:, -1]), sampling, generator)
        step: list[int | None] = [None] * len(prompts)
        going = []
        for place, (row, token) in enumerate(zip(live, chosen.tolist(), strict=True)):
            if token not in stop:
                step[row] = token
                going.append(place)
        if not going:
            return
        yield step
        if len(going) < len(live):
            live = [live[place] for place in going]
            keep = torch.tensor(going, device=device)
            chosen, state = chosen[keep], state.select(keep)


def _captured(
    model: MoEMamba,
    hidden: Tensor,
    state: State,
    count: int,
    sampling: Sampling,
    stop: Collection[int],
    generator: torch.Generator | None,
) -> Iterator[list[int | None]]:
    """`stream` from the prompt's hidden states on, each token but the first by a CUDA graph; rows that have stopped run
    along until all have."""
    first = sample(model.head(hidden[:, -1]), sampling, generator)
    stopped = [False] * first.shape[0]
    with claim(model, state, count, greedy=sampling.temperature == 0) as decoder:
        for tokens in decoder.tokens(first, count, lambda logits: sample(logits, sampling, generator)):
            stopped = [before or token in stop for before, token in zip(stopped, tokens, strict=True)]
            if all(stopped):
                return
            yield [None if done else token for done, token in zip(stopped, tokens, strict=True)]


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
