"""Decoding on the CPU at several batch sizes, beside another version of the package: CPU seconds of one thread.

    python benchmarks/decoding.py                               # this version alone
    python benchmarks/decoding.py --against ../parent/src       # and another source tree, in turns
    python benchmarks/decoding.py --transformers                # and the Mamba of transformers, of the same sizes
    python benchmarks/decoding.py --int8                        # and this version with weights of 8 bits
    python benchmarks/decoding.py --gpu [--tune]                # on a GPU instead; see captured.py

Random weights, prompts of 16 tokens, the most likely token each; tokens a second of whole steps of the engine, the best
of the turns. Experts hit are those that a layer's tokens visit in a step, on average: their weights are what a step
reads. Then prompts of 2,048 tokens. Each turn is a process of its own. The last line is JSON.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captured
import torch

PROMPT, WARM, VOCABULARY, LONG = 16, 3, 200, 2048
SOURCE = Path(__file__).resolve().parent.parent / "src"


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def build(name: str, int8: bool) -> Any:
    from moemamba import MoEMamba, preset

    torch.manual_seed(0)
    model = MoEMamba(preset(name)).eval().requires_grad_(False)
    if int8:
        from moemamba.layers.quantised import quantise

        quantise(model)
    return model


def decode(model: Any, rows: int, steps: int) -> float:
    """CPU seconds of a step; of a version without an engine, of a token more of `generate`."""
    try:
        from moemamba.inference import Engine, Request, Sampling
    except ImportError:
        from moemamba import generate

        return longer(lambda count: generate(model, prompts(rows, PROMPT), count, temperature=0), steps)

    engine = Engine(model, rows)
    for prompt in prompts(rows, PROMPT).tolist():
        engine.submit(Request(prompt, WARM + steps + 1, Sampling(temperature=0)))
    for _ in range(WARM):
        engine.step()
    begun = time.process_time()
    for _ in range(steps):
        engine.step()
    return (time.process_time() - begun) / steps


def longer(generate: Callable[[int], object], steps: int) -> float:
    """CPU seconds of each of the last tokens of a longer answer."""
    generate(WARM)  # compiles kernels
    times = []
    for count in (WARM, WARM + steps):
        begun = time.process_time()
        generate(count)
        times.append(time.process_time() - begun)
    return (times[1] - times[0]) / steps


@torch.inference_mode()
def hit(model: Any, rows: int) -> float:
    """Experts that a layer's tokens visit in a step."""
    tokens, record = prompts(rows, PROMPT), []
    state = model(tokens[:, :-1]).state
    model(tokens[:, -1:], state, record=record)
    return sum(len(choice.indices.unique()) for choice in record) / max(1, len(record))


@torch.inference_mode()
def prefill(model: Any) -> float:
    """CPU seconds of a prompt."""
    tokens = prompts(1, LONG)
    model(tokens[:, :64])
    begun = time.process_time()
    model.backbone(tokens)
    return time.process_time() - begun


def worker(models: list[str], batches: list[int], steps: int, int8: bool = False) -> dict[str, Any]:
    from moemamba import MoEMamba

    found: dict[str, Any] = {}
    recorded = "record" in inspect.signature(MoEMamba.forward).parameters
    for name in models:
        model = build(name, int8)
        found[name] = {
            "step": {str(rows): min(decode(model, rows, max(4, steps // rows)) for _ in range(3)) for rows in batches},
            "hit": {str(rows): hit(model, rows) for rows in batches if recorded},
            "prompt": min(prefill(model) for _ in range(2)),
        }
    return found


def transformers_worker(models: list[str], batches: list[int], steps: int) -> dict[str, Any]:
    """Of the pure Mamba models, by `generate`."""
    import transformers

    from moemamba import preset

    found: dict[str, Any] = {}
    for config in (preset(name) for name in models if preset(name).pattern == "M"):
        torch.manual_seed(0)
        own = transformers.MambaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_blocks,
            vocab_size=config.vocab_size,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        model = transformers.MambaForCausalLM(own).eval()
        times = {}
        for rows in batches:
            read = prompts(rows, PROMPT)
            run = {"do_sample": False, "pad_token_id": 0}
            times[str(rows)] = longer(
                lambda count: model.generate(read, max_new_tokens=count, min_new_tokens=count, **run),  # noqa: B023
                max(4, steps // rows),
            )
        found[next(name for name in models if preset(name) == config)] = {"step": times}
    return found


def ask(side: str, source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker says in a process of its own."""
    words = ["--models", *args.models, "--batches", *map(str, args.batches), "--steps", str(args.steps)]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", side, *words],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def best(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The shortest time of each measurement over turns."""
    result: dict[str, Any] = json.loads(json.dumps(found[0]))
    for other in found[1:]:
        for name, values in other.items():
            for rows, seconds in values["step"].items():
                result[name]["step"][rows] = min(result[name]["step"][rows], seconds)
            if "prompt" in values:
                result[name]["prompt"] = min(result[name]["prompt"], values["prompt"])
    return result


def show(sides: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    ours = sides["ours"]
    for name in args.models:
        for rows in map(str, args.batches):
            line = f"{name:18} batch {rows:>3}: {int(rows) / ours[name]['step'][rows]:7.0f} tokens/s"
            line += f", {ours[name]['hit'][rows]:4.1f} experts hit"
            for side, values in sides.items():
                if side != "ours" and name in values:
                    ratio = values[name]["step"][rows] / ours[name]["step"][rows]
                    line += f"; {side} {int(rows) / values[name]['step'][rows]:7.0f}, {ratio:4.2f} times that"
            print(line)
        line = f"{name:18} prompt of {LONG}: {ours[name]['prompt']:6.3f} s"
        for side in ("int8", "before"):
            if side in sides:
                line += f"; {side} {sides[side][name]['prompt']:6.3f} s"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["moe-mamba-small", "mamba-small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 3, 4, 5, 8, 16, 64])
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--transformers", action="store_true", help="measure its Mamba too")
    parser.add_argument("--int8", action="store_true", help="measure weights of 8 bits too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96, help="steps of one row; fewer of more rows")
    parser.add_argument("--worker", choices=("ours", "int8", "before", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, kernels asked for beside those chosen unasked")
    parser.add_argument("--tune", action="store_true", help="with --gpu: try other cuts of the experts' kernels")
    args = parser.parse_args()
    if args.gpu:
        if args.batches == parser.get_default("batches"):
            args.batches = None
        captured.main(args)
        return
    if args.worker:
        torch.set_num_threads(1)
        asked = (args.models, args.batches, args.steps)
        print(
            json.dumps(
                transformers_worker(*asked) if args.worker == "transformers" else worker(*asked, args.worker == "int8")
            )
        )
        return
    sources = {"ours": SOURCE}
    if args.int8:
        sources["int8"] = SOURCE
    if args.against:
        sources["before"] = args.against.resolve()
    if args.transformers:
        sources["transformers"] = SOURCE
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sources}
    for _ in range(args.turns):
        for side, source in sources.items():
            found[side].append(ask(side, source, args))
    sides = {side: best(turns) for side, turns in found.items()}
    show(sides, args)
    print(json.dumps({"threads": 1, "clock": "process_time", **sides}))


if __name__ == "__main__":
    main()
