"""The class that lm-eval asks for probabilities and for texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from ...checkpoint import load
from ...inference import generate
from ...model import MoEMamba
from ...text import Tokenizer

CHUNK = 1024
"""tokens whose logits are held at once, and that a long text is read in"""

Pair = tuple[list[int], list[int]]


@register_model("moemamba")
class MoEMambaLM(TemplateLM):  # type: ignore[misc]
    """`--model moemamba --model_args pretrained=RUN` where this has been imported.

    How texts are cut into context and continuation, and what becomes of the answers, is lm-eval's. A context that
    several continuations share, as in multiple choice, is read once: its state is forked.

    Args:
        pretrained: a run, a checkpoint, or a model with its tokenizer.
        batch_size: contexts, and continuations, that are computed at once.
        max_gen_toks: tokens to write where a task does not say.
    """

    def __init__(
        self,
        pretrained: str | Path | tuple[MoEMamba, Tokenizer],
        batch_size: int | str = 16,
        device: str | None = None,
        max_gen_toks: int = 256,
        **ignored: Any,
    ):
        super().__init__()
        given = pretrained if isinstance(pretrained, tuple) else load(pretrained, device or "auto")
        self.model, self.words = given[0].eval(), given[1]
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that begins with nothing."""
        return self.words.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, without any that the tokenizer adds."""
        return self.words.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        contexts = sorted(
            {tuple(context) for context, _ in pairs}, key=len
        )  # of like lengths, so that little is padding
        wanted: dict[tuple[int, ...], list[int]] = {context: [] for context in contexts}
        for number, (context, _) in enumerate(pairs):
            wanted[tuple(context)].append(number)
        found: dict[int, tuple[float, bool]] = {}
        for begin in range(0, len(contexts), self.batch_size):
            batch = contexts[begin : begin + self.batch_size]
            last, state = self._read(batch)
            rows = [row for row, context in enumerate(batch) for _ in wanted[context]]
            numbers = [number for context in batch for number in wanted[context]]
            for first in range(0, len(rows), self.batch_size):
                part = slice(first, first + self.batch_size)
                scores = self._score(last[rows[part]], state.select(rows[part]), [pairs[n][1] for n in numbers[part]])
                found |= dict(zip(numbers[part], scores, strict=True))
        return [found[number] for number in range(len(pairs))]

    def _read(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, Any]:
        """The last hidden vector (b, d) of contexts of any lengths, and the state after them."""
        tokens, marks = self._padded(contexts)
        hidden, state, _ = self.model.backbone(tokens, None, marks)
        ends = torch.tensor([len(context) - 1 for context in contexts], device=tokens.device)
        return hidden[torch.arange(len(contexts), device=tokens.device), ends], state

    def _score(self, last: Tensor, state: Any, continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """The log-probability of each, and whether it is what the model would write."""
        tokens, marks = self._padded([continuation[:-1] for continuation in continuations])
        hidden = last[:, None]
        if tokens.shape[1]:
            hidden = torch.cat([hidden, self.model.backbone(tokens, state, marks)[0]], dim=1)
        return [
            self._judged(vectors[: len(continuation)], continuation)
            for vectors, continuation in zip(hidden, continuations, strict=True)
        ]

    def _judged(self, hidden: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
        """Of the tokens that hidden vectors (l, d) are to predict."""
        targets = torch.tensor(tokens, dtype=torch.int64, device=hidden.device)
        total, greedy = 0.0, True
        for begin in range(0, len(tokens), CHUNK):
            target = targets[begin : begin + CHUNK]
            chances = self.model.head(hidden[begin : begin + CHUNK]).float().log_softmax(-1)
            total += float(chances.gather(1, target[:, None]).double().sum())
            greedy = greedy and bool((chances.argmax(-1) == target).all())
        return total, greedy

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Tokens (b, l), filled up on the right, and what says where they are not of the text; None if nowhere."""
        longest, device = max(map(len, rows)), next(self.model.parameters()).device
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        marks = torch.full_like(tokens, -1)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], marks[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64), 0
        return tokens.to(device), None if bool((marks == 0).all()) else marks.to(device)

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts; however long, all of a text is context to what follows."""
        return [self._rolling(self.words.encode(request.args[0])) for request in requests]

    def _rolling(self, ids: list[int]) -> float:
        device = next(self.model.parameters()).device
        tokens = torch.tensor([[self.eot_token_id, *ids]], device=device)
        state, total = None, 0.0
        for begin in range(0, len(ids), CHUNK):
            part = slice(begin, min(begin + CHUNK, len(ids)))
            hidden, state, _ = self.model.backbone(tokens[:, part], state)
            total += self._judged(hidden[0], ids[part])[0]
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to what ends them, which is left out."""
        return [self._written(*request.args) for request in requests]

    def _written(self, context: str, asked: dict[str, Any]) -> str:
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        prompt = self.words.encode(context) or [self.eot_token_id]
        temperature = float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0
        tokens = int(asked.get("max_gen_toks", self.max_gen_toks))
        stop = [self.eot_token_id, *stops]
        written = generate(self.model, prompt, tokens, stop=stop, tokenizer=self.words, temperature=temperature, seed=0)
        text = self.words.decode(written)
        for end in stops:  # one that begins within the last token
            text = text.partition(end)[0]
        return text
