"""`moemamba eval`: how well a run's model predicts a text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..data.config import DataConfig
from ..host.files import expanded
from ..reading import validate
from ..training.config import run_of
from .loading import Loading
from .options import Merged, Place, Positional
from .terminal import parse, show, show_json

if TYPE_CHECKING:
    from ..data.batches import Tokens
    from ..data.windows import HeldOut
    from ..model import MoEMamba
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
    loading: Merged[Loading] = field(default_factory=Loading)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format of activations"""
    by_position: bool = False
    """loss by how many tokens come before, in sequences of --context tokens of one document each, read by pieces with
    the state carried over; of models with experts their routing too"""
    recall: bool = False
    """whether made-up facts (a passkey, a definition) are still known up to --context tokens later, text in between"""
    piece: int = 2048
    """with these two: positions read at once"""
    across_documents: bool = False
    """with --by-position: sequences of the text as it lies, whatever documents it is of"""
    since: int | None = None
    """with --by-position: each loss minus that after so many tokens, of the same sequences"""
    forgets: int | None = None
    """with --by-position: each loss minus that of the same token where the state is emptied every so many tokens"""
    trials: int = 32
    """with --recall: facts at each distance"""
    json: bool = False
    """print one JSON object in place of the table"""

    def __post_init__(self) -> None:
        validate(self, positive=("context", "batch_size", "tokens", "piece", "since", "forgets", "trials", "limit"))
        if self.by_position + self.recall + (self.tasks is not None) > 1:
            raise ValueError("--by-position, --recall and --tasks are measurements apart; ask for one at a time")
        of: dict[str, dict[str, Any]] = {
            "by_position": {"across_documents": False, "since": None, "forgets": None},
            "recall": {"trials": 32},
            "tasks": {"tasks_data": None, "limit": None},
        }
        for asked, options in of.items():
            for name, usual in options.items():
                if not getattr(self, asked) and getattr(self, name) != usual:
                    flags = f"--{name.replace('_', '-')}", f"--{asked.replace('_', '-')}"
                    raise ValueError(f"{flags[0]} goes with {flags[1]} alone; give both, or neither")


def main(arguments: Sequence[str]) -> None:
    asked = parse(Eval, arguments, "eval")
    if asked.tasks is not None:
        _ask(asked, [name.strip() for name in asked.tasks.split(",") if name.strip()])
        return
    import torch

    from ..training.evaluate import BLOCKS, evaluate

    model, tokenizer = asked.loading.load(asked.run)
    path = expanded(asked.run)
    run = run_of(path)
    own = run.reads() if run else DataConfig()
    config = replace(
        own,
        validation=own.validation if asked.data is None else asked.data,
        context=asked.context or own.context,
        cache=str(path / "tokens"),
    )
    texts = _texts(asked, config, tokenizer)
    what = asked.data or f"held-out part of {' and '.join(text.name for text in texts)}"
    dtype = getattr(torch, asked.dtype)
    if asked.by_position or asked.recall:
        _far(asked, model, tokenizer, texts[0].tokens, config.context, what, dtype)
        return
    found = evaluate(
        model,
        texts,
        context=config.context,
        batch_size=asked.batch_size,
        most=asked.tokens,
        reset_state=config.reset_state,
        dtype=dtype,
        drop_gap=any(experts.capacity_factor for experts in model.config.routers),
        blocks=BLOCKS,
    )
    if asked.json:
        show_json({"text": what, "context": config.context} | asdict(found))
        return
    error = (
        "" if found.standard_error is None else f", ± {found.standard_error:.4f} over {len(found.blocks or ())} parts"
    )
    rows = [
        ("text", f"{found.tokens:,}", f"tokens of {what}"),
        ("loss", f"{found.loss:.4f}", f"nats a token{error}"),
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


def _far(
    asked: Eval, model: "MoEMamba", tokenizer: "Tokenizer", tokens: "Tokens", context: int, what: str, dtype: Any
) -> None:
    """Contexts beyond those of training."""
    from ..longcontext import TASKS, by_position, recall
    from .far import distances, tell_positions, tell_recall

    how: dict[str, Any] = {"batch_size": asked.batch_size, "piece": asked.piece, "dtype": dtype}
    if asked.recall:
        found = {
            name: recall(model, tokenizer, tokens, name, distances(context), trials=asked.trials, **how)
            for name in TASKS
        }
        tell_recall(found, what, asked.json)
        return
    most = asked.tokens and max(1, asked.tokens // context)
    which: dict[str, Any] = {"most": most, "across": asked.across_documents}
    result = by_position(model, tokens, context, since=asked.since, forgets=asked.forgets, **which, **how)
    tell_positions(result, what, asked.json)


def _ask(asked: Eval, tasks: Sequence[str]) -> None:
    """Questions in place of a text."""
    from ..integrations.lm_eval import MoEMambaLM, evaluate

    model = MoEMambaLM(asked.loading.load(asked.run), asked.batch_size)
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
