"""Text that a model was trained on, read again beside what it is to learn, so that it forgets less (rehearsal)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.config import NO_TEST, DataConfig
from ..data.corpora import open_corpora
from ..host.progress import Report
from ..model import MoEMamba
from ..text import Tokenizer
from ..training.config import run_of
from ..training.evaluate import BLOCKS, Evaluation, evaluate
from .config import FinetuneConfig
from .packing import Rows

MOST = 65536
"""held-out tokens that are read to see what was forgotten"""


class Replay:
    """Rows of a text, in which each document begins from an empty state, and the part of the text that is held out.

    Row n is the same for ever, and of all rows so far replayed ones have their share to within one.

    Args:
        run: the model's place, which says what it was trained on.
    Raises:
        ValueError, OSError: see `open_corpora`; or the share stands alone, and what the run read is not known.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, config: FinetuneConfig, report: Report):
        assert config.replayed is not None
        share, text = config.replayed
        own = run_of(run) if text is None else None
        if text is None and own is None:
            raise ValueError(f"what {run} was trained on is not known; name a text behind the share, {share:g}:TEXT")
        how = own.reads() if own else DataConfig(text, cache=str(run / "tokens"))
        how = replace(how, sampling="windows", reset_state=True, lanes=None, test=NO_TEST)
        how = replace(how, seed=config.seed, context=config.context)
        self._config, self._corpora = config, open_corpora(how, tokenizer, report)
        self._rows, self._beside = self._corpora.rows(how), share / (1 - share)
        self._others = 0
        names, count = " and ".join(part.name for part in self._corpora.parts), self._corpora.train_tokens
        report.note(f"{'replay':10}{share:.3g} of the rows, of {count:,} tokens of {names}")

    @property
    def count(self) -> int:
        """Rows that were read."""
        return int(self._others * self._beside)

    def beside(self, rows: Rows) -> Rows:
        """A batch with the rows that go with it, in which every token is learnt."""
        first = self.count
        self._others += len(rows.tokens)
        if self.count == first:
            return rows
        tokens, targets, documents, _ = self._rows.read(np.arange(first, self.count, dtype=np.uint64))
        assert documents is not None
        more = tokens.shape[1] - rows.tokens.shape[1]
        own = (F.pad(part, (0, more), value=empty) for part, empty in zip(rows, (0, -100, -1), strict=True))
        return Rows(*map(torch.cat, zip(own, (tokens, targets, documents.long()), strict=True)))

    def loss(self, model: MoEMamba) -> Evaluation:
        """How well a model predicts the part that is held out, which is never replayed."""
        how: dict[str, Any] = {"context": self._config.context, "batch_size": self._config.batch_size}
        return evaluate(model, self._corpora.validation, most=MOST, reset_state=True, blocks=BLOCKS, **how)

    def told(self, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        """What there is to know of it later."""
        return {
            "replayed_text": [part.name for part in self._corpora.parts],
            "replayed_content": self._corpora.content,
            "replayed_rows": self.count,
            "text_before": before.loss,
            "text_after": after.loss,
        }
