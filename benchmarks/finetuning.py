"""Fine-tuning on a small real set of questions, and upcycling, each beside what it is to be compared with.

The set is of Python's own standard library: asked is what a function is called and takes, answered the first line of
its docstring. A small model is trained on the library first. Then:

- LoRA beside all weights, with the library replayed (`--share`, 0 for no replay). Of three learning rates each that
  one counts that does best on one half of the held-out questions and of the library's held-out text: the lowest loss of
  answers among those that raise the loss of the text by 0.03 at most, or among all if none does. What is shown was
  measured on the other halves, as the mean over seeds; standard errors are over questions, and over parts of the text,
  paired.
- From a dense model, its mixture trained on beside the dense model trained on, for as many steps, paired by seeds.

    python benchmarks/finetuning.py --steps 900 --width 64

`--base` is a run that was trained on the library already, to tune that one. The last line is one JSON object.
"""

import argparse
import ast
import hashlib
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moemamba import TrainConfig, load, preset, train
from moemamba.data.corpora import open_corpora
from moemamba.data.windows import HeldOut
from moemamba.finetuning.config import FinetuneConfig
from moemamba.finetuning.examples import Example, read_examples
from moemamba.finetuning.sft import answer_loss, finetune
from moemamba.finetuning.template import PLAIN, Template
from moemamba.finetuning.upcycling import upcycle
from moemamba.host.progress import Report
from moemamba.training.config import read_run
from moemamba.training.evaluate import BLOCKS, evaluate

METHODS: tuple[tuple[Literal["lora", "all"], tuple[float, ...]], ...] = (
    ("lora", (1e-3, 2e-3, 4e-3)),
    ("all", (2e-4, 5e-4, 1e-3)),
)
FORGOTTEN = 0.03  # nats a token of the text
EPOCHS, CONTEXT, TEXT = 2.0, 256, 65536
SILENT = Report(silent=True)


def questions(folder: Path, most: int) -> None:
    """Write the set: 70% to learn, and the two halves of the rest, by the hash of a question."""
    lines = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            said = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if not said:
                continue
            asked = f"def {node.name}({ast.unparse(node.args)[:80]})"
            answer = said.strip().splitlines()[0][:120]
            pair = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": pair}))
    parts: dict[str, list[str]] = {"learn": [], "choose": [], "judge": []}
    for line in lines[:: max(1, len(lines) // most)]:
        place = hashlib.sha256(line.encode()).digest()[0] / 256
        parts["learn" if place < 0.7 else "choose" if place < 0.85 else "judge"].append(line)
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")


class Held(NamedTuple):
    """What is not learnt."""

    questions: list[Example]
    text: tuple[HeldOut, ...]


class Measured(NamedTuple):
    """Tokens and nats (parts, 2): of each question, and of each part of a text."""

    answers: NDArray[np.float64]
    text: NDArray[np.float64]

    def __sub__(self, before: "Measured") -> "Measured":
        """How many nats more for the same tokens."""
        return Measured(*(np.stack([a[:, 0], a[:, 1] - b[:, 1]], 1) for a, b in zip(self, before, strict=True)))


def measure(folder: str | Path, held: Held) -> Measured:
    model, _ = load(folder)
    how = FinetuneConfig(context=CONTEXT, batch_size=1)
    counts = [int(each.learnt[1:].sum()) for each in held.questions]
    losses = [answer_loss(model, [each], how) or 0.0 for each in held.questions]
    found = evaluate(model, held.text, context=CONTEXT, batch_size=16, most=TEXT, blocks=BLOCKS)
    blocks = [[weight * found.tokens, weight * found.tokens * loss] for weight, loss in found.blocks or ()]
    return Measured(np.stack([counts, np.multiply(counts, losses)], 1), np.array(blocks))


def together(each: list[Measured]) -> Measured:
    """The mean over seeds."""
    return Measured(*(np.mean(parts, 0) for parts in zip(*each, strict=True)))


def per_token(parts: NDArray[np.float64]) -> tuple[float, float]:
    """Nats a token, and the standard error of that ratio over the parts."""
    tokens, nats = parts.T
    value = nats.sum() / tokens.sum()
    error = np.sqrt(len(parts) * np.var(nats - value * tokens, ddof=1)) / tokens.sum()
    return round(float(value), 4), round(float(error), 4)


def tuning(folder: Path, base: TrainConfig, most: int, share: float, seeds: int) -> dict[str, object]:
    questions(folder, most)
    _, tokenizer = load(base.run)
    template, corpora = Template(PLAIN, tokenizer), open_corpora(base.reads(), tokenizer, SILENT)

    def held(name: str, text: tuple[HeldOut, ...]) -> tuple[Held, Measured]:
        found = Held(read_examples(str(folder / f"{name}.jsonl"), template, True, 0.0, CONTEXT), text)
        return found, measure(base.run, found)

    (choose, chosen_before), (judge, before) = held("choose", corpora.validation), held("judge", corpora.test)
    found: dict[str, object] = {"questions": [len(choose.questions), len(judge.questions)]}
    found |= {"answers_before": per_token(before.answers), "text_before": per_token(before.text)}
    print(json.dumps(found), flush=True)
    judged: dict[str, list[Measured]] = {}
    for method, rates in METHODS:

        def tuned(rate: float, seed: int, method: Literal["lora", "all"] = method) -> Path:
            how = {"epochs": EPOCHS, "batch_size": 8, "context": CONTEXT, "held_out": 0.0}
            config = FinetuneConfig(str(folder / "learn.jsonl"), method, **how)  # type: ignore[arg-type]
            config = replace(config, learning_rate=rate, replay=f"{share:g}" if share else None, seed=seed)
            return finetune(base.run, folder / f"{method}-{rate}-{seed}", config, SILENT).out

        rate = best(method, rates, lambda rate: measure(tuned(rate, 0), choose), chosen_before)
        places = [folder / f"{method}-{rate}-0", *(tuned(rate, seed) for seed in range(1, seeds))]
        judged[method] = [measure(place, judge) for place in places]
        over_seeds = together(judged[method])
        found[method] = {
            "rate": rate,
            "answers": per_token(over_seeds.answers),
            "text_more": per_token((over_seeds - before).text),
            "answers_of_seeds": [per_token(each.answers)[0] for each in judged[method]],
            "text_more_of_seeds": [per_token((each - before).text)[0] for each in judged[method]],
        }
        print(method, json.dumps(found[method]), flush=True)
    apart = together(judged["lora"]) - together(judged["all"])
    return found | {"share": share, "lora_minus_all": per_token(apart.answers)}


def best(name: str, rates: tuple[float, ...], tried: Callable[[float], Measured], before: Measured) -> float:
    """The rate whose answers are best among those that forget little."""
    found = []
    for rate in rates:
        began, measured = time.perf_counter(), tried(rate)
        answers, more = per_token(measured.answers)[0], per_token((measured - before).text)[0]
        print(
            f"{name}, {rate:g}: answers {answers:.4f}, text {more:+.4f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        found.append((more > FORGOTTEN, answers, rate))
    if all(forgets for forgets, _, _ in found):
        return min(found, key=lambda each: each[1])[2]
    return min(found)[2]


def trained(name: str, steps: int, width: int | None, batch: int, folder: Path) -> TrainConfig:
    config = TrainConfig(
        model=preset(name, d_model=width) if width else preset(name),
        run=str(folder / name),
        steps=steps,
        batch_size=batch,
        context=256,
        eval_every=10**6,
        save_every=steps,
        eval_tokens=32768,
    )
    train(config, report=SILENT)
    return config


def text_loss(config: TrainConfig, folder: str | Path) -> float:
    """Of the library's held-out text."""
    model, tokenizer = load(folder)
    text = open_corpora(config.reads(), tokenizer, SILENT).test
    return evaluate(model, text, context=CONTEXT, batch_size=16, most=TEXT).loss


def sparse(
    folder: Path, dense: str, steps: int, more: int, width: int | None, batch: int, seeds: int
) -> dict[str, object]:
    base = trained(dense, steps, width, batch, folder)
    done = upcycle(base.run, folder / "sparse", 8)
    differences = []
    for seed in range(seeds):
        losses = []
        for start, model in ((base.run, base.model), (str(folder / "sparse"), done.config)):
            on = replace(
                base,
                model=model,
                start=start,
                run=f"{start}-on-{seed}",
                steps=more,
                save_every=more,
                data_seed=seed + 1,
                learning_rate=1e-3,
            )
            train(on, report=SILENT)
            losses.append(text_loss(base, on.run))
            print(f"seed {seed}, {model.pattern}: {losses[-1]:.4f}", flush=True)
        differences.append(losses[1] - losses[0])
    error = stdev(differences) / seeds**0.5 if seeds > 1 else float("nan")
    return {"at_step_0": done.difference, "sparse_minus_dense": round(mean(differences), 4), "error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--more", type=int, help="steps of the dense model and of its mixture; as many if not given")
    parser.add_argument("--width", type=int, help="d_model; the preset's if not given")
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 bytes in a step of training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--share", type=float, default=0.25, help="of the rows, that is replayed; 0 for none")
    parser.add_argument("--base")
    parser.add_argument("--dense", default="mamba-tiny", help="preset that is upcycled")
    parser.add_argument("--only", choices=("tuning", "sparse"))
    asked = parser.parse_args()
    found: dict[str, object] = {"benchmark": "finetuning", "steps": asked.steps, "width": asked.width}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if asked.only != "sparse":
            base = (
                read_run(Path(asked.base) / "train.json")
                if asked.base
                else trained("moe-mamba-tiny", asked.steps, asked.width, asked.batch, place)
            )
            found |= tuning(place, replace(base, run=asked.base or base.run), asked.questions, asked.share, asked.seeds)
        if asked.only != "tuning":
            more = asked.more or asked.steps
            found |= sparse(place, asked.dense, asked.steps, more, asked.width, asked.batch, asked.seeds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
