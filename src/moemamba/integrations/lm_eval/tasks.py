"""Tasks by short names: lm-eval's own, from the hub, or the same questions from files."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from ...host.files import expanded
from .model import MoEMambaLM

HUB = {"lambada": "lambada_openai"}
"""tasks that lm-eval calls otherwise"""
QUERY = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
}
ANSWERED = QUERY | {"doc_to_text": "{{query.rstrip()}}\nAnswer:"}
PAIRS = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
}
# Where the files of each task are, below a folder, what is asked, and what is measured.
LOCAL: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lambada": (
        "lambada/lambada_openai_test.jsonl",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        },
        ("perplexity", "acc"),
    ),
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", QUERY, ("acc", "acc_norm")),
    "piqa": ("piqa/piqa_val_llmfoundry.jsonl", ANSWERED, ("acc", "acc_norm")),
    "arc_easy": ("arc/arc_easy_test_llmfoundry.jsonl", ANSWERED, ("acc", "acc_norm")),
    "arc_challenge": ("arc/arc_challenge_test_llmfoundry.jsonl", ANSWERED, ("acc", "acc_norm")),
    "winogrande": (
        "winogrande/winogrande_xl_val_llmfoundry.jsonl",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_target": "continuation",
            "doc_to_choice": "context_options",
        },
        ("acc",),
    ),
    "blimp": ("blimp/*.jsonl", PAIRS, ("acc",)),
}


@dataclass(frozen=True)
class Score:
    """What a model reached in a task."""

    task: str
    measure: str
    """such as "acc", "acc_norm" or "perplexity" """
    value: float
    error: float | None
    """standard error, where lm-eval gives one"""
    questions: int


def evaluate(
    model: MoEMambaLM, tasks: Sequence[str], data: str | None = None, limit: int | None = None, shots: int | None = None
) -> list[Score]:
    """Scores as lm-eval computes them.

    Args:
        tasks: names of `LOCAL`, or without `data` any of lm-eval's.
        data: a folder with the questions (`LOCAL`); the hub if None.
        limit: questions of each task at most.
        shots: solved examples before each question; as lm-eval has it if None.
    Raises:
        ValueError: a task that is not known, or whose files are not there.
    """
    asked: list[Any] = [HUB.get(task, task) for task in tasks]
    if data is not None:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        asked = [config for task in tasks for config in from_files(task, expanded(data))]
    manager = TaskManager(include_defaults=data is None)
    if data is None and (unknown := [name for name in asked if name not in manager.all_tasks]):
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; it is known here: {', '.join(LOCAL)}")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of the standard error of a perplexity, which takes a second
    found = lm_eval.simple_evaluate(
        model=model, tasks=asked, task_manager=manager, limit=limit, num_fewshot=shots, bootstrap_iters=200
    )
    scores = [score for name, values in found["results"].items() for score in _scores(name, values, found)]
    return _together(scores)


def from_files(task: str, folder: Path) -> list[dict[str, Any]]:
    """lm-eval's description of a task, one for each file of it.

    Raises:
        ValueError: the task is not known, or its files are not there.
    """
    if task not in LOCAL:
        raise ValueError(f"there is no task {task!r} for files; choose of {', '.join(LOCAL)}")
    place, asks, measures = LOCAL[task]
    files = sorted(folder.glob(place))
    if not files:
        raise ValueError(f"{folder} has no {place}, which {task} is asked from")
    return [_description(task if len(files) == 1 else f"{task}/{file.stem}", file, asks, measures) for file in files]


def _description(name: str, file: Path, asks: dict[str, Any], measures: Sequence[str]) -> dict[str, Any]:
    listed = [
        {
            "metric": measure,
            "aggregation": "perplexity" if measure == "perplexity" else "mean",
            "higher_is_better": measure != "perplexity",
        }
        for measure in measures
    ]
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, "metric_list": listed, "num_fewshot": 0, "metadata": {"version": 1.0}, **where, **asks}


def _scores(name: str, values: dict[str, Any], found: dict[str, Any]) -> list[Score]:
    questions = int(found["n-samples"].get(name, {}).get("effective", 0))
    scores: list[Score] = []
    for key, value in values.items():
        measure, _, filtered = key.partition(",")
        if not isinstance(value, int | float) or not filtered or measure.endswith("_stderr"):
            continue
        error = values.get(f"{measure}_stderr,{filtered}")
        known = float(error) if isinstance(error, int | float) else None
        scores.append(Score(name, measure, float(value), known, questions))
    return scores


def _together(scores: list[Score]) -> list[Score]:
    """Behind the parts of a task (blimp/causative) their mean, each part counting once."""
    parts = [score for score in scores if "/" in score.task]
    means = []
    for task in dict.fromkeys(score.task.partition("/")[0] for score in parts):
        own = [score for score in parts if score.task.startswith(f"{task}/")]
        errors = [score.error for score in own]
        error = math.sqrt(sum(e * e for e in errors if e is not None)) / len(own) if None not in errors else None
        value = sum(score.value for score in own) / len(own)
        means.append(Score(task, own[0].measure, value, error, sum(score.questions for score in own)))
    return scores + means
