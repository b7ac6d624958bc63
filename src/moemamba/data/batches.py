"""Tokens on disk to batches that are a pure function of the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..text import Tokenizer
from .config import DataConfig

_BITS = np.uint64(20)  # of a share in `Mixture`


@dataclass(frozen=True)
class Tokens:
    """A text as token ids on disk, every document followed by the end-of-text token."""

    ids: NDArray[Any]
    """(n,) uint16 or uint32, memory-mapped"""
    ends: NDArray[np.int64]
    """(documents,) where each document ends, its end-of-text token included, memory-mapped"""
    bytes: int
    """of UTF-8 text"""
    tokenizer: Tokenizer | None = None
    """that made them; None if that is not known, so that the bytes of a part are taken to be its share of all"""
    lost: float = 0.0
    """share of the text's bytes that the tokens do not spell"""
    spelled: float = 1.0
    """bytes that the tokens decode to, for each byte of the text"""


class Batch(NamedTuple):
    """Rows of text and what follows each token."""

    tokens: Tensor
    """(b, l) int64"""
    targets: Tensor
    """(b, l) int64, the tokens that follow"""
    seq_idx: Tensor | None
    """(b, l) int32 document of each token, counted from the row's first; None if state is not reset"""
    goes_on: Tensor | None = None
    """(b,) bool: the row goes on where the same row of the batch before ended; None where no state is carried"""

    def to(self, device: torch.device) -> "Batch":
        """On another device; the host does not wait for a GPU."""
        if device.type == "cuda":
            return self._each(lambda part: part.pin_memory().to(device, non_blocking=True))
        return self._each(lambda part: part.to(device))

    def like(self, device: torch.device) -> "Batch":
        """Memory for such a batch, not filled."""
        return self._each(lambda part: torch.empty_like(part, device=device))

    def fill(self, batch: "Batch") -> None:
        """Take the values of a batch of the same shape; a GPU does so when it comes to it."""
        for place, part in zip(self, batch, strict=True):
            if place is not None:
                assert part is not None and part.shape == place.shape
                place.copy_(part.pin_memory() if place.is_cuda and not part.is_cuda else part, non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Rows(Protocol):
    """Rows of text by number: row n is the same for ever, and any order of asking for them is as good."""

    context: int

    def chosen(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Which text each of (b,) rows is, for people: see the classes."""

    def read(self, numbers: NDArray[np.uint64]) -> Batch:
        """(b,) rows."""


class Batches:
    """`batches[step]`: the same for ever, whatever the model does, wherever training stops and resumes.

    The rows of all steps are numbered one after another. Those of a step are shared out over ranks, so that several
    processes read together what one would.

    Args:
        batch_size: rows of this rank in a step.
        part, parts: of each row this part alone, of so many equally long ones.
    """

    def __init__(self, rows: Rows, batch_size: int, rank: int = 0, world_size: int = 1, part: int = 0, parts: int = 1):
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size
        self.context = rows.context
        length = rows.context // parts
        self._part = slice(part * length, (part + 1) * length) if parts > 1 else slice(None)

    def chosen(self, step: int) -> NDArray[np.int64]:
        """Which text this rank reads at a step."""
        return self.rows.chosen(self._numbers(step))

    def __getitem__(self, step: int) -> Batch:
        tokens, targets, seq_idx, goes_on = self.rows.read(self._numbers(step))
        own = self._part
        return Batch(tokens[:, own], targets[:, own], None if seq_idx is None else seq_idx[:, own], goes_on)

    def _numbers(self, step: int) -> NDArray[np.uint64]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.uint64)


class Windows:
    """Tokens cut into windows of `context` that do not overlap.

    Every epoch goes through all of them in its own order, a Feistel permutation of (seed, epoch), which needs neither
    memory nor state.

    Args:
        reset_state: number the documents in `Batch.seq_idx`, so that every one begins from an empty state.
    Raises:
        ValueError: the tokens do not fill one window.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int, *, reset_state: bool = False):
        self.tokens, self.context, self.seed, self.reset_state = tokens, context, seed, reset_state
        require_window("the training data", tokens, context)
        self.windows = (len(tokens.ids) - 1) // context

    def chosen(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(b,) windows, counted from the beginning of the text."""
        epochs, places = np.divmod(numbers, np.uint64(self.windows))
        keys = _mix(np.full_like(epochs, self.seed), epochs)
        return permute(places, self.windows, keys).astype(np.int64)

    def read(self, numbers: NDArray[np.uint64]) -> Batch:
        return _batch(self.tokens, self.chosen(numbers) * self.context, self.context, self.reset_state)


class Lanes:
    """Rows that each read on where the same row of the batch before ended, so that its state can be carried over.

    An epoch cuts the windows of `Windows` into as many stretches as a batch has rows, which begin at a place of their
    own in each epoch, so that what does not fill the stretches differs; which row reads which stretch is a permutation
    of (seed, epoch). Row n is row n modulo `rows` of batch n / rows.

    Args:
        rows: of a batch, all its parts and processes together.
        reset_state: see `Windows`; a row that begins with a document does not go on then.
    Raises:
        ValueError: the tokens do not fill one window a row.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int, rows: int, *, reset_state: bool = False):
        self.tokens, self.context, self.seed, self.rows, self.reset_state = tokens, context, seed, rows, reset_state
        require_window("the training data", tokens, context)
        self.windows = (len(tokens.ids) - 1) // context
        self.stretch = self.windows // rows
        if not self.stretch:
            raise ValueError(
                f"carry_state needs a window of text for each row, but {self.windows:,} windows of {context:,} tokens "
                f"are fewer than batch_size = {rows}; give more text, or a smaller batch_size or context"
            )

    def chosen(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(b,) windows, counted from the beginning of the text."""
        batches, row = np.divmod(numbers, np.uint64(self.rows))
        epochs, place = np.divmod(batches, np.uint64(self.stretch))
        keys = _mix(np.full_like(epochs, self.seed), epochs)
        lane = permute(row, self.rows, keys)
        first = _mix(keys, np.full_like(keys, self.rows)) % np.uint64(self.windows)
        return ((first + lane * np.uint64(self.stretch) + place) % np.uint64(self.windows)).astype(np.int64)

    def read(self, numbers: NDArray[np.uint64]) -> Batch:
        windows = self.chosen(numbers)
        batch = _batch(self.tokens, windows * self.context, self.context, self.reset_state)
        goes_on = (numbers // np.uint64(self.rows) % np.uint64(self.stretch) > 0) & (windows > 0)
        if self.reset_state:
            before = self.tokens.ids[np.maximum(windows * self.context - 1, 0)]
            goes_on &= before != self.tokens.ids[-1]  # every text ends with the token that ends documents
        return batch._replace(goes_on=torch.from_numpy(goes_on))


class SampledDocuments:
    """Rows as the paper's authors drew them, and as much a pure function of the number as `Windows`.

    A row is made from documents drawn uniformly, with replacement: they are laid end to end until all but the longest
    exceed `context`, and a row's tokens are read from a random place on, around the end to the beginning. State is
    not reset in between.

    Raises:
        ValueError: the tokens do not fill one window.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int):
        self.tokens, self.context, self.seed = tokens, context, seed
        require_window("the training data", tokens, context)

    def chosen(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(b,) the numbers themselves: with the seed they say which text a row is."""
        return numbers.astype(np.int64)

    def read(self, numbers: NDArray[np.uint64]) -> Batch:
        ids = torch.from_numpy(np.stack([self._row(number) for number in numbers]))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)

    def _row(self, number: np.uint64) -> NDArray[np.int64]:
        """(context + 1,) tokens."""
        ends, count = self.tokens.ends, np.uint64(len(self.tokens.ends))
        key = _mix(np.array([self.seed], np.uint64), np.array([number], np.uint64))
        draws: list[NDArray[Any]] = []
        drawn = total = longest = 0
        while total - longest <= self.context:
            document = int(_mix(key, np.array([drawn], np.uint64))[0] % count)
            begin = int(ends[document - 1]) if document else 0
            draws.append(self.tokens.ids[begin : int(ends[document])])
            drawn, total, longest = drawn + 1, total + len(draws[-1]), max(longest, len(draws[-1]))
        start = int(_mix(key, np.array([drawn], np.uint64))[0] % np.uint64(total))
        places = np.arange(start, start + self.context + 1)
        return np.concatenate(draws).take(places, mode="wrap").astype(np.int64)


class Mixture:
    """Rows of several corpora in fixed shares, spread as evenly as whole rows allow.

    Of the first n rows, a corpus has its share of n to within one for each corpus; so every batch has nearly the same
    mixture, and each corpus goes through its own epochs undisturbed. Corpora are split off one after another: of two,
    the first has row n if floor((n + 1) share) exceeds floor(n share), and that floor is the row's number in it. In
    whole numbers, so that it is exact for 2^44 rows.

    Args:
        shares: of the rows, positive, of any sum.
    """

    def __init__(self, parts: Sequence[Rows], shares: Sequence[float]):
        self.parts, self.context = parts, parts[0].context
        whole, last = 1 << int(_BITS), len(shares) - 1
        quotas = [round(share / sum(shares[k:]) * whole) for k, share in enumerate(shares)]
        self._quotas = [np.uint64(min(max(quota, 1), whole - (k < last))) for k, quota in enumerate(quotas)]

    def chosen(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(b, 2) the corpus, and what it says of the row."""
        corpus, places = self._share(numbers)
        chosen = np.empty_like(corpus)
        for k, part in enumerate(self.parts):
            chosen[corpus == k] = part.chosen(places[corpus == k])
        return np.stack([corpus, chosen], 1)

    def read(self, numbers: NDArray[np.uint64]) -> Batch:
        corpus, places = self._share(numbers)
        batches = [self.parts[k].read(places[corpus == k]) for k in np.unique(corpus)]
        order = torch.from_numpy(np.argsort(np.argsort(corpus, kind="stable")))
        tokens, targets = (torch.cat([batch[k] for batch in batches])[order] for k in (0, 1))
        resets = [batch.seq_idx for batch in batches if batch.seq_idx is not None]
        return Batch(tokens, targets, torch.cat(resets)[order] if resets else None)

    def _share(self, numbers: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """(b,) the corpus of each row, and (b,) its number among that corpus's rows."""
        corpus, places = np.full(len(numbers), -1), numbers.copy()  # places: among the rows of all corpora from k on
        for k, quota in enumerate(self._quotas):
            before, after = (places * quota) >> _BITS, ((places + np.uint64(1)) * quota) >> _BITS
            waiting, takes = corpus < 0, after > before
            corpus[waiting & takes] = k
            places = np.where(waiting, np.where(takes, before, places - before), places)
        return corpus, places


def make_rows(tokens: Tokens, config: DataConfig) -> Rows:
    """The rows that a run reads of one corpus."""
    if config.lanes:
        return Lanes(tokens, config.context, config.seed, config.lanes, reset_state=config.reset_state)
    if config.sampling == "documents":
        return SampledDocuments(tokens, config.context, config.seed)
    return Windows(tokens, config.context, config.seed, reset_state=config.reset_state)


def require_window(what: str, tokens: Tokens, context: int, more: str = "") -> None:
    """Raise ValueError unless there is one window and the token that follows it; `more` ends its advice."""
    if len(tokens.ids) <= context:
        raise ValueError(
            f"{what} has {len(tokens.ids):,} tokens, but one window needs {context + 1:,}; "
            f"give more text or a smaller context{more}"
        )


def permute(places: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where permutations of 0 .. size - 1, one for each key, send places.

    A Feistel network on the next power of four, walked until it lands below `size` (Black and Rogaway, 2002, "Ciphers
    with arbitrary finite domains"): random access to a shuffle of any length.

    Args:
        places, keys: (n,) uint64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = places.copy()
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(keys[outside] + np.uint64(turn), right) & mask)
        result[outside] = left << half | right
        outside = result >= size
    return result


def _mix(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of two numbers (the finaliser of SplitMix64, modulo 2^64)."""
    x = a * np.uint64(0x9E3779B97F4A7C15) + b
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _batch(tokens: Tokens, starts: NDArray[np.int64], context: int, reset_state: bool) -> Batch:
    places = starts[:, None] + np.arange(context + 1)
    ids = torch.from_numpy(tokens.ids[places].astype(np.int64))
    seq_idx = None
    if reset_state:
        document = np.searchsorted(tokens.ends, places[:, :-1], side="right")
        seq_idx = torch.from_numpy((document - document[:, :1]).astype(np.int32))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), seq_idx)
