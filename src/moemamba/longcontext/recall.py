"""Recall: whether a model still knows a fact that it read k tokens ago, with text of its own kind in between.

A fact is made up, so that nothing but the context can tell it; the same question with another fact in the context is
what a model says that does not remember. Passkeys: Mohtashami and Jaggi, arXiv 2305.16300.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import Tokens
from ..model import MoEMamba
from ..text import Tokenizer
from .pieces import hidden_by_pieces

FRONT = 128  # tokens up to the end of the fact, as many in every trial where the fact is shorter


@dataclass(frozen=True)
class Task:
    """A fact, and what asks for it; in both `{name}` is made up, and `{value}` is what is to be recalled."""

    fact: str
    question: str
    answer: str


TASKS = {
    "passkey": Task(
        "\nThe pass key is {value}. Remember it: {value} is the pass key.\n", "\nThe pass key is", " {value}"
    ),
    "definition": Task("\n{name} = {value}\n", "\n{name} =", " {value}"),
}


@dataclass(frozen=True)
class Recalled:
    """What was found at one distance."""

    distance: int
    """tokens from the end of the fact to the answer"""
    trials: int
    accuracy: float
    """share of the trials in which every token of the answer was the model's likeliest"""
    accuracy_error: float
    """its standard error"""
    loss: float
    """nats a token of the answer"""
    gain: float
    """that loss where the context has another fact, minus it: how much the model knows of the right one"""
    gain_error: float | None
    """its standard error; None of a single trial"""


@torch.inference_mode()
def recall(
    model: MoEMamba,
    tokenizer: Tokenizer,
    filler: Tokens,
    task: str,
    distances: Sequence[int],
    *,
    trials: int = 32,
    batch_size: int = 4,
    piece: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Recalled]:
    """How well a model recalls facts at each distance.

    Args:
        model: in evaluation mode.
        filler: text to put in between, read from places that are drawn.
        task: a name of `TASKS`.
        distances: tokens from the end of the fact to the answer.
        piece: positions read at once.
    Raises:
        ValueError: there is no such task, or the filler is too short.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    found = []
    for distance in distances:
        drawn = np.random.default_rng([seed, distance])
        prompts = [_prompt(TASKS[task], tokenizer, filler, distance, drawn) for _ in range(trials)]
        right, known, other = [], [], []
        for first in range(0, trials, batch_size):
            part = prompts[first : first + batch_size]
            loss, correct = _answers(model, [(p.told, p.size) for p in part], piece, dtype)
            right += correct
            known += loss
            other += _answers(model, [(p.mistold, p.size) for p in part], piece, dtype)[0]
        share, gains = sum(right) / trials, np.subtract(other, known)
        error = float(gains.std(ddof=1) / math.sqrt(trials)) if trials > 1 else None
        spread = math.sqrt(share * (1 - share) / trials)
        found.append(Recalled(distance, trials, share, spread, float(np.mean(known)), float(gains.mean()), error))
    return found


@dataclass(frozen=True)
class _Prompt:
    told: list[int]
    """text, fact, text, question and answer"""
    mistold: list[int]
    """the same with another fact"""
    size: int
    """tokens of the answer"""


def _prompt(task: Task, tokenizer: Tokenizer, filler: Tokens, distance: int, drawn: np.random.Generator) -> _Prompt:
    """One trial."""
    name = "".join(drawn.choice(list(letters)) for _ in range(3) for letters in ("bdfgklmnprstvz", "aeiou"))
    value, other = (str(number) for number in drawn.choice(90_000, 2, replace=False) + 10_000)
    fact, another = (tokenizer.encode(task.fact.format(name=name, value=each)) for each in (value, other))
    question = tokenizer.encode(task.question.format(name=name))
    answer = tokenizer.encode(task.answer.format(value=value))
    between = distance - len(question)
    if between < 0:
        raise ValueError(f"a distance of {distance} tokens is less than the question's {len(question)}; give more")
    before, gap = _text(filler, FRONT, drawn), _text(filler, between, drawn)
    told, mistold = ([*before[len(each) :][-FRONT:], *each, *gap, *question, *answer] for each in (fact, another))
    return _Prompt(told, mistold, len(answer))


def _text(filler: Tokens, length: int, drawn: np.random.Generator) -> list[int]:
    """So many tokens from a place that is drawn."""
    if len(filler.ids) < length:
        raise ValueError(
            f"the text has {len(filler.ids):,} tokens, but {length:,} are to lie between; give a longer one"
        )
    start = int(drawn.integers(0, len(filler.ids) - length + 1))
    ids: NDArray[np.int64] = filler.ids[start : start + length].astype(np.int64)
    return ids.tolist()  # type: ignore[no-any-return]


def _answers(
    model: MoEMamba, prompts: Sequence[tuple[list[int], int]], piece: int, dtype: torch.dtype
) -> tuple[list[float], list[bool]]:
    """Of each prompt, which ends with an answer of so many tokens: nats a token of it, and whether all were likeliest.

    Those of one length are read together.
    """
    loss, right = [0.0] * len(prompts), [False] * len(prompts)
    for length in {len(ids) for ids, _ in prompts}:
        places = [k for k, (ids, _) in enumerate(prompts) if len(ids) == length]
        rows = torch.tensor([prompts[k][0] for k in places], device=model.embedding.weight.device)
        sizes = [prompts[k][1] for k in places]
        nats, hits = _ends(model, rows, max(sizes), piece, dtype)
        for k, size, own, hit in zip(places, sizes, nats, hits, strict=True):
            loss[k], right[k] = own[-size:].mean().item(), bool(hit[-size:].all())
    return loss, right


def _ends(model: MoEMamba, rows: Tensor, size: int, piece: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(b, size) each: loss of the last tokens of rows (b, l), and whether each was the likeliest."""
    kept: list[Tensor] = []
    for _, hidden in hidden_by_pieces(model, rows[:, :-1], piece, dtype):
        kept = [*kept, hidden][-(size // piece + 2) :]
    last = torch.cat(kept, 1)[:, -size:]
    with torch.autocast(rows.device.type, dtype, enabled=dtype != torch.float32):
        logits = model.head(last)
    targets = rows[:, -size:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return loss, logits.argmax(-1) == targets
