"""`moemamba eval`: how well a run's model predicts a text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ..data.config import DataConfig
from ..host.files import expanded
from ..reading import validate
from .options import Place, Positional
from .terminal import parse, show, show_json
from .train import begun

if TYPE_CHECKING:
    from ..data.batches import HeldOut
    from ..text import Tokenizer


@dataclass(frozen=True)
class Eval:
    """Measure how well a run's model predicts a text."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    data: Place | None = None
    """text to predict, a file or a folder; the held-out text of the run if None"""
    context: int | None = None
    """tokens in a window; as in the run if None"""
    batch_size: int = 16
    """windows that are computed at once"""
    tokens: int | None = None
    """predict about that many at most; all if None"""
    tasks: str | None = None
    """questions of lm-evaluation-harness in place of a text, commas between them: lambada, hellaswag, piqa, arc_easy,
    arc_challenge, winogrande, blimp, or any of its own"""
    tasks_data: Place | None = None
    """a folder with the questions as JSON lines, such as piqa/piqa_val_llmfoundry.jsonl; the hub if None"""
    limit: int | None = None
    """questions of each task at most; all if None"""
    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    json: bool = False
    """print one JSON object in place of the table"""

    def __post_init__(self) -> None:
        validate(self, positive=("context", "batch_size", "tokens", "limit"))
        if self.tasks is None and not (self.tasks_data is None and self.limit is None):
            raise ValueError("tasks_data and limit are of tasks; say which, such as --tasks lambada,piqa")


def main(arguments: Sequence[str]) -> None:
    asked = parse(Eval, arguments, "eval")
    if asked.tasks is not None:
        _ask(asked, [name.strip() for name in asked.tasks.split(",") if name.strip()])
        return
    from ..checkpoint import load
    from ..training.evaluate import evaluate

    model, tokenizer = load(asked.run, asked.device)
    path = expanded(asked.run)
    run = begun(path) or begun(path.parent.parent)  # a run, a checkpoint of one, or else a model alone
    own = run.reads() if run else DataConfig()
    config = replace(
        own,
        validation=own.validation if asked.data is None else asked.data,
        context=asked.context or own.context,
        cache=str(path / "tokens"),
    )
    texts = _texts(asked, config, tokenizer)
    found = evaluate(
        model,
        texts,
        context=config.context,
        batch_size=asked.batch_size,
        most=asked.tokens,
        reset_state=config.reset_state,
        drop_gap=any(experts.capacity_factor for experts in model.config.routers),
    )
    what = asked.data or f"held-out part of {' and '.join(text.name for text in texts)}"
    if asked.json:
        show_json({"text": what, "context": config.context} | asdict(found))
        return
    rows = [
        ("text", what, f"{found.tokens:,} tokens"),
        ("loss", f"{found.loss:.4f}", "nats a token"),
        *((f"  {name}", f"{loss:.4f}", "") for name, loss in (found.apart or {}).items()),
        ("perplexity", f"{found.perplexity:.3f}", ""),
        ("bits per byte", *_bits_per_byte(found.bits_per_byte, max(text.tokens.lost for text in texts))),
        ("accuracy", f"{found.accuracy:.2%}", "of the tokens were the model's likeliest"),
    ]
    if found.drop_gap is not None:
        rows.append(
            ("drop gap", f"{found.drop_gap:+.4f}", "what the capacity limits of training would add to the loss")
        )
    show(rows)


def _ask(asked: Eval, tasks: Sequence[str]) -> None:
    """Questions in place of a text."""
    from ..integrations.lm_eval import MoEMambaLM, evaluate

    model = MoEMambaLM(asked.run, asked.batch_size, asked.device)
    scores = evaluate(model, tasks, asked.tasks_data, asked.limit)
    if asked.json:
        show_json({"tasks": [asdict(score) for score in scores]})
        return
    rows = [
        (
            s.task,
            s.measure,
            f"{s.value:.4f}",
            "" if s.error is None else f"± {s.error:.4f}",
            f"{s.questions:,} questions",
        )
        for s in scores
    ]
    show(rows, ("task", "measure", "value", "standard error", "asked"))


def _texts(asked: Eval, config: DataConfig, tokenizer: "Tokenizer") -> tuple["HeldOut", ...]:
    """What is predicted."""
    from ..data.corpora import open_held_out
    from ..host.progress import Report

    try:
        return open_held_out(config, tokenizer, Report(silent=True))
    except FileNotFoundError as error:
        if asked.data is not None:
            raise
        raise FileNotFoundError(
            f"{error}; the run in {asked.run} was trained on it: name a text with --data"
        ) from error


def _bits_per_byte(value: float, lost: float) -> tuple[str, str]:
    """The figure, and how far it can be trusted."""
    if value != value:
        return "-", f"none: the tokens do not spell {lost:.2%} of the text"
    if lost:
        return f"{value:.4f}", f"of a text of which the tokens do not spell {lost:.2%}"
    return f"{value:.4f}", "comparable between tokenizers"
