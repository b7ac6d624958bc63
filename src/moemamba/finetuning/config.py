"""How a model is fine-tuned. No torch here."""

import re
from dataclasses import dataclass
from typing import Literal

from ..data.config import weighted
from ..reading import validate

REPLAYED = 0.25
"""share of the rows if a text to replay is named alone"""
MOST_REPLAYED = 0.9
"""nine rows beside each row of examples: they are one batch, which has to fit into memory"""


@dataclass(frozen=True)
class FinetuneConfig:
    """A model, what it is to answer, and how its weights move.

    Raises:
        ValueError: a value that cannot work.
    """

    data: str = "chat.jsonl"
    """JSON lines: {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, or {"text"}"""
    method: Literal["lora", "all"] = "lora"
    """lora: small matrices beside the projections and the experts (arXiv 2106.09685), added to them in the end; all:
    every weight"""
    rank: int = 16
    """inner width of LoRA's small matrices"""
    epochs: float = 3.0
    """times that the data is read"""
    learning_rate: float | None = None
    """highest learning rate; 0.002 for lora and 0.0002 for all if None"""
    batch_size: int = 8
    """rows of a step, each of which holds as many examples as fit"""
    context: int = 1024
    """tokens in a row; longer examples are cut"""
    answers_only: bool = True
    """learn what the assistant says, or the completion, alone; otherwise all of it"""
    held_out: float = 0.05
    """share of the examples that is kept to measure with, chosen by a hash of their content"""
    replay: str | None = None
    """text to read again beside the examples, so that less of it is forgotten: a share of the rows, 0.25, for what the
    run was trained on; with a text behind it, 0.25:books/, for another, of the kinds that --data of train takes"""
    template: str | None = None
    """a Jinja file that writes messages as text; that of the model, or a plain one, if None"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises"""
    weight_decay: float = 0.0
    """weight decay, of matrices alone"""
    clip: float = 1.0
    """largest norm of the gradient"""
    seed: int = 0
    """a number that fixes the order of the data, and how the small matrices begin"""
    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""

    def __post_init__(self) -> None:
        validate(
            self,
            positive=("rank", "epochs", "learning_rate", "batch_size", "context", "clip"),
            not_negative=("held_out", "warmup", "weight_decay", "seed"),
        )
        if self.held_out >= 1 or self.warmup > 1:
            raise ValueError("held_out must be less than 1, and warmup 1 at most")
        if self.context < 2:
            raise ValueError("context is 1; a row needs a token and the one after it: choose 2 or more")
        if self.replayed and not 0 < self.replayed[0] <= MOST_REPLAYED:
            raise ValueError(
                f"replay is {self.replay!r}; the share must be greater than 0 and at most {MOST_REPLAYED:g}"
            )

    @property
    def replayed(self) -> tuple[float, str | None] | None:
        """The share of the rows that are replayed and their text, None for what the run was trained on; None for no
        replay."""
        if self.replay is None:
            return None
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", self.replay):
            return float(self.replay), None
        try:
            ((text, share),) = weighted(self.replay)
        except ValueError as error:
            raise ValueError(str(error).replace("data", "replay", 1)) from error
        return REPLAYED if share is None else share, text

    @property
    def rate(self) -> float:
        return self.learning_rate or (2e-3 if self.method == "lora" else 2e-4)
