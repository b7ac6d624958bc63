"""Fine-tuning on a small real set of questions, and upcycling, each beside what it is to be compared with.

The set is of Python's own standard library: asked is what a function is called and takes, answered the first line of
its docstring. A small model is trained on the library first. Then: LoRA beside all weights (loss of held-out answers,
and of held-out text of the library, before and after); and, from a dense model, its mixture trained on beside the
dense model trained on, for as many steps, over seeds.

    python benchmarks/finetuning.py --steps 600 --width 64

`--base` is a run that was trained on the library already, to tune that one.
"""

import argparse
import ast
import json
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from moemamba import TrainConfig, load, preset, train
from moemamba.data.corpora import open_held_out
from moemamba.finetuning.config import FinetuneConfig
from moemamba.finetuning.sft import finetune
from moemamba.finetuning.upcycling import upcycle
from moemamba.host.progress import Report
from moemamba.training.evaluate import evaluate

SILENT = Report(silent=True)


def questions(file: Path) -> int:
    """Write the set; returns how many there are."""
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
    file.write_text("\n".join(lines[:: max(1, len(lines) // 1500)]), encoding="utf-8")
    return len(lines)


def text_loss(config: TrainConfig, folder: str | Path) -> float:
    """Of the library's held-out text."""
    model, tokenizer = load(folder)
    return evaluate(
        model, open_held_out(config.reads(), tokenizer, SILENT), context=256, batch_size=16, most=32768
    ).loss


def trained(name: str, steps: int, width: int, folder: Path) -> TrainConfig:
    config = TrainConfig(
        model=preset(name, d_model=width),
        run=str(folder / name),
        steps=steps,
        batch_size=8,
        context=256,
        eval_every=10**6,
        save_every=steps,
        eval_tokens=32768,
    )
    train(config, report=SILENT)
    return config


def tuning(folder: Path, steps: int, width: int, run: str | None) -> dict[str, object]:
    base = replace(TrainConfig(), run=run) if run else trained("moe-mamba-tiny", steps, width, folder)
    count, before = questions(folder / "chat.jsonl"), text_loss(base, base.run)
    found: dict[str, object] = {"questions": count, "text_before": round(before, 4)}
    for method in ("lora", "all"):
        began = time.perf_counter()
        config = FinetuneConfig(str(folder / "chat.jsonl"), method, epochs=2.0, batch_size=8, context=256, held_out=0.1)
        done = finetune(base.run, folder / method, config, SILENT)
        found |= {f"{method}_before": round(done.before or 0, 4), f"{method}_answers": round(done.after or 0, 4)}
        found[f"{method}_text"] = round(text_loss(base, done.out) - before, 4)
        found[f"{method}_seconds"] = round(time.perf_counter() - began, 1)
    return found


def sparse(folder: Path, steps: int, more: int, width: int, seeds: int) -> dict[str, object]:
    base = trained("mamba-tiny", steps, width, folder)
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
        differences.append(losses[1] - losses[0])
    error = stdev(differences) / seeds**0.5 if seeds > 1 else float("nan")
    return {"at_step_0": done.difference, "sparse_minus_dense": round(mean(differences), 4), "error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--more", type=int, help="steps of the dense model and of its mixture; as many if not given")
    parser.add_argument("--width", type=int, default=128, help="d_model")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base")
    parser.add_argument("--only", choices=("tuning", "sparse"))
    asked = parser.parse_args()
    found: dict[str, object] = {"benchmark": "finetuning", "steps": asked.steps, "width": asked.width}
    with tempfile.TemporaryDirectory() as place:
        if asked.only != "sparse":
            found |= tuning(Path(place), asked.steps, asked.width, asked.base)
        if asked.only != "tuning":
            found |= sparse(Path(place), asked.steps, asked.more or asked.steps, asked.width, asked.seeds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
