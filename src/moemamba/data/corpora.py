"""What a run reads: its tokenizer, its corpora and their shares, and the text that is held out."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..host.progress import Report
from ..text import Tokenizer, load_tokenizer, train_bpe
from .batches import Mixture, Rows, Tokens, make_rows, require_window
from .config import NO_TEST, DataConfig, weighted
from .documents import Documents, is_held_out
from .preparation import HELD_OUT, Show, cache_directory, prepare
from .prepared import Corpus, digest, is_prepared
from .windows import LOST, HeldOut, splits

HALF = "; every second window is kept for the test at the end"
BPE_TEXT = 1 << 26  # characters that a tokenizer is trained on at most


@dataclass(frozen=True)
class Corpora:
    """The corpora of a run."""

    parts: tuple[Corpus, ...]
    shares: tuple[float, ...]
    """of the rows of every batch; their sum is 1"""
    validation: tuple[HeldOut, ...]
    """what a run is evaluated on while it trains"""
    test: tuple[HeldOut, ...] = ()
    """what a finished run is tested on, none of it among `validation`; empty for no test"""

    @property
    def content(self) -> str:
        """Hash of the training tokens and, of several corpora, their shares."""
        if len(self.parts) == 1:
            return self.parts[0].content
        return digest([(part.content, round(share, 6)) for part, share in zip(self.parts, self.shares, strict=True)])

    @property
    def train_tokens(self) -> int:
        """Of all parts, each counted once."""
        return sum(len(part.train.ids) for part in self.parts)

    def rows(self, config: DataConfig) -> Rows:
        """What a run reads of them."""
        rows = [make_rows(part.train, config) for part in self.parts]
        return rows[0] if len(rows) == 1 else Mixture(rows, self.shares)

    def introduce(self, report: Report, tokens: int) -> None:
        """Say what there is, which share of a run of so many tokens each corpus has, and how often it will be read."""
        for part, share in zip(self.parts, self.shares, strict=True):
            here = f"{share:.3g} of the rows; " if len(self.parts) > 1 else ""
            times = tokens * share / len(part.train.ids)
            report.note(f"{'data':10}{here}{_describe(part.name, part.train)}, read {times:,.3g} times")
        for held in self.validation:
            report.note(f"{'held out':10}{_describe(held.name, held.tokens)}{HALF if held.half == 0 else ''}")
        for text in self.test:
            if text.half is None:
                report.note(f"{'test':10}{_describe(text.name, text.tokens)}")
        for part in self.parts:
            for note in remarks(part):
                report.note(f"{'':10}{note}")


def find_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that a configuration names, or that prepared tokens bring.

    Raises:
        FileNotFoundError, ValueError: see `load_tokenizer`, `train_bpe` and `Documents`.
    """
    if trained := re.fullmatch(r"bpe-(\d+)", config.tokenizer):
        return train_bpe(_training_text(config), int(trained[1]))
    own = [source for source, _ in weighted(config.data) if source is not None and is_prepared(source)]
    asked = config.tokenizer != DataConfig.tokenizer
    return load_tokenizer(config.tokenizer if asked or not own else own[0])


def _training_text(config: DataConfig) -> Iterator[str]:
    """Documents to train a tokenizer on: of each corpus its share, those that will be held out left out."""
    sources = [(Documents(source), weight) for source, weight in weighted(config.data)]
    weights = [documents.bytes or 1 if weight is None else weight for documents, weight in sources]
    for (documents, _), weight in zip(sources, weights, strict=True):
        left = BPE_TEXT * weight / sum(weights)
        for text in documents:
            if config.validation is not None or not is_held_out(text.encode(), HELD_OUT):
                yield text
                left -= len(text)
            if left <= 0:
                break


def open_corpora(config: DataConfig, tokenizer: Tokenizer, report: Report) -> Corpora:
    """Tokenise what a run reads, or find it in the cache.

    Raises:
        FileNotFoundError, ValueError, OSError: see `prepare`.
        ValueError: a text does not fill one window.
    """
    sources = weighted(config.data)
    own = HELD_OUT if config.validation is None else 0.0
    parts = [_open(source, own, config, tokenizer, report) for source, _ in sources]
    for part in parts:
        require_window(f"the training text of {part.name}", part.train, config.context)
    tokens = [len(part.train.ids) for part in parts]
    weights = [size if weight is None else weight for size, (_, weight) in zip(tokens, sources, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    if config.validation is None:
        held = tuple(HeldOut(part.name, share, part.validation) for part, share in zip(parts, shares, strict=True))
    else:
        held = open_held_out(config, tokenizer, report)
    for text in held:
        other = ", or held-out text of its own (validation)" if config.validation is None else ""
        require_window(f"the held-out text of {text.name}", text.tokens, config.context, other)
    return Corpora(tuple(parts), tuple(shares), *_apart(held, config, tokenizer, report))


def _apart(
    held: tuple[HeldOut, ...], config: DataConfig, tokenizer: Tokenizer, report: Report
) -> tuple[tuple[HeldOut, ...], tuple[HeldOut, ...]]:
    """What is evaluated on in training, and what a finished run is tested on: a text of its own, or every second window
    of what is held out if there are two or more of each text."""
    if config.test is None and all(splits(text.tokens, config.context) for text in held):
        first, second = (tuple(text._replace(half=half) for text in held) for half in (0, 1))
        return first, second
    if config.test is None or config.test == NO_TEST:
        return held, ()
    text = _whole(config.test, config, tokenizer, report)
    require_window(f"the test text of {text.name}", text.tokens, config.context)
    return held, (text,)


def open_held_out(config: DataConfig, tokenizer: Tokenizer, report: Report) -> tuple[HeldOut, ...]:
    """What a run is evaluated on: `validation` (of prepared tokens, what they held out), or a share of each corpus.

    Raises:
        FileNotFoundError, ValueError, OSError: see `prepare`.
    """
    if config.validation is None:
        return open_corpora(replace(config, test=NO_TEST), tokenizer, report).validation
    return (_whole(config.validation, config, tokenizer, report),)


def _whole(source: str, config: DataConfig, tokenizer: Tokenizer, report: Report) -> HeldOut:
    """A text of its own to evaluate on: of prepared tokens what they held out, if anything."""
    corpus = _open(source, 0.0, config, tokenizer, report)
    return HeldOut(corpus.name, 1.0, corpus.validation if len(corpus.validation.ids) else corpus.train)


def _open(source: str | None, share: float, config: DataConfig, tokenizer: Tokenizer, report: Report) -> Corpus:
    with tokenising(report) as show:
        return prepare(source, tokenizer, cache_directory(Path(config.cache)), share, show)


@contextmanager
def tokenising(report: Report) -> Iterator[Show]:
    """What shows the progress of tokenising, from its first word on."""
    began: float | None = None

    def show(done: int, total: int) -> None:
        nonlocal began
        if began is None:
            began = time.monotonic()
            report.begin("tokenising", total)
        else:
            speed = f"{done / 1e6 / (time.monotonic() - began):,.1f} MB/s"
            report.update(done, f"{done / 1e6:,.1f} MB tokenised, {speed}")

    try:
        yield show
    finally:
        report.end()


def remarks(corpus: Corpus) -> list[str]:
    """What a reader should know of a corpus: what was left out or changed, and what its tokens lose."""
    found = list(corpus.notes)
    if corpus.skipped and not found:  # prepared by an older version
        found.append(f"{corpus.skipped:,} files left out, which are not UTF-8 text")
    if corpus.lost == 1:
        found.append(f"{corpus.name} is no text, so that there are no bits per byte")
    elif corpus.lost:
        much = "; bits per byte mean nothing and are left out" if corpus.lost > LOST else ""
        found.append(f"the tokens do not spell {corpus.lost:.2%} of the text of {corpus.name}{much}")
    return found


def _describe(name: str, tokens: Tokens) -> str:
    size = f"{tokens.bytes / 1e6:,.1f} MB" if tokens.bytes >= 100_000 else f"{tokens.bytes / 1e3:,.1f} kB"
    return f"{len(tokens.ends):,} documents, {len(tokens.ids):,} tokens, {size} of {name}"
