"""Training with several GPUs, by the training loop itself; every process of `torchrun` runs this program.

    python benchmarks/processes.py same OUT                                # one process
    torchrun --nproc-per-node 2 benchmarks/processes.py same OUT           # two
    python benchmarks/processes.py table OUT                               # side by side
    python benchmarks/processes.py                                         # same and speed, on one GPU and on all

same: 20 steps of a small model for each way of sharing it out, with a capacity and without, in float32 and bfloat16.
speed: tokens a second of `moe-mamba-25m` at 256 x 256 tokens a process, layers compiled.
long: tokens a second of `moe-mamba-25m` on one sequence of 1,048,576 tokens, shared by all processes.
large: a model whose weights, gradients and optimiser need 1.25 times the memory of one GPU, its experts spread.
Each writes one JSON file into the folder OUT; `table` prints them all, last in one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import nn

from moemamba import ModelConfig, MoEMamba, TrainConfig, count_parameters, preset
from moemamba.config import ExpertsConfig
from moemamba.distributed import Processes, join, own_part
from moemamba.host.progress import Report
from moemamba.training import loop, spread
from moemamba.training.update import step

VOCABULARY = 50_257
WAYS: dict[str, dict[str, Any]] = {
    "copies": {},
    "parameters": {"shard": "parameters"},
    "experts": {"expert_parallel": 2},
    "both": {"shard": "parameters", "expert_parallel": 2},
    "sequences": {"sequence_parallel": 2},
}


def train(config: TrainConfig, processes: Processes) -> list[dict[str, Any]]:
    """The lines of the run's metrics, in the first process; nothing is saved, which would only take time."""
    loop.take = lambda *arguments: None
    loop.train(config, report=Report(silent=True))
    if not processes.first:
        return []
    lines = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def same(processes: Processes, folder: str) -> dict[str, Any]:
    """Losses and gradients' norms of 20 steps, for every way, precision and capacity."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        for factor in (None, 1.0):
            model = ModelConfig("ME", 4, 128, experts=ExpertsConfig(8, capacity_factor=factor))
            for way, change in (WAYS if processes.size > 1 else {"one": {}}).items():
                name = f"{dtype}, capacity {factor}, {way}"
                config = TrainConfig(
                    model, data=argparse.__file__, run=f"{folder}/{name}", steps=20, batch_size=16, context=128,
                    routing_groups=2, log_every=1, eval_every=20, eval_tokens=1024, dtype=dtype, **change,
                )  # fmt: skip
                lines = train(config, processes)
                found[name] = [(line["loss"], line["grad_norm"]) for line in lines]
    return found


def speed(
    processes: Processes,
    folder: str,
    shard: str = "none",
    profile: bool = False,
    cuda_graph: str = "auto",
    long: int = 0,
) -> dict[str, Any]:
    """Tokens a second over the last steps, and peak memory; of one sequence of `long` tokens if that is given."""
    rows, steps = 256 * processes.size, 60
    config = TrainConfig(
        preset("moe-mamba-25m"), **tokens(folder, processes), run=f"{folder}/speed", steps=steps,
        batch_size=rows, context=256, log_every=10, eval_every=1000, eval_tokens=65536,
        learning_rate=1e-3, compile=True, shard=shard, cuda_graph=cuda_graph,
    )  # fmt: skip
    if long:
        config = replace(
            config, steps=12, batch_size=1, context=long, log_every=2, eval_tokens=long, test="none",
            sequence_parallel=processes.size, recompute=True, compile=False, cuda_graph="off",
        )  # fmt: skip
    spread.draw = quick
    text: list[str] = []
    if profile:
        step.Step.__call__ = profiled(step.Step.__call__, 45, text)
    begun = time.perf_counter()
    lines = train(config, processes)
    if not lines:
        return {}
    return {
        "tokens_per_second": [line["tokens_per_second"] for line in lines],
        "peak_gib": round(lines[-1].get("peak_memory", 0) / 2**30, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "profile": text,
    }


def profiled(update: Any, at: int, text: list[str]) -> Any:
    """A step, which in call `at` writes down its kernels."""
    count = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count != at:
            return update(*arguments)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = update(*arguments)
            torch.cuda.synchronize()
        kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        text.append(f"{sum(event.self_device_time_total for event in kernels) / 1e3:8.2f} ms of kernels in all")
        for event in kernels[:45]:
            text.append(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:4d} x {event.key[:100]}")
        return result

    return wrapped


def large(processes: Processes, folder: str) -> dict[str, Any]:
    """A few steps of what one GPU cannot hold."""
    memory = torch.cuda.get_device_properties(processes.device).total_memory if torch.cuda.is_available() else 1 << 27
    base = preset("moe-mamba-100m") if torch.cuda.is_available() else ModelConfig("ME", 2, 64)
    one, two = (total(base.replace(n_experts=number)) for number in (2, 4))
    n_experts = 2 * round((1.25 * memory / 16 - one) / (two - one)) + 2
    model = base.replace(n_experts=n_experts)
    found: dict[str, Any] = {"n_experts": n_experts, "parameters": total(model), "gpu_gb": round(memory / 1e9, 1)}
    spread.draw = quick
    config = TrainConfig(
        model, **tokens(folder, processes), run=f"{folder}/large", steps=8, batch_size=8, context=256, log_every=1,
        eval_every=1000, eval_tokens=2048, learning_rate=3e-4, expert_parallel=processes.size,
    )  # fmt: skip
    begun = time.perf_counter()
    try:
        lines = train(config, processes)
    except ValueError as error:
        return found | {"refused": str(error)}
    if not lines:
        return {}
    return found | {
        "losses": [line["loss"] for line in lines],
        "tokens_per_second": [line["tokens_per_second"] for line in lines],
        "peak_gb": round(lines[-1].get("peak_memory", 0) / 1e9, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def total(config: ModelConfig) -> int:
    count = count_parameters(config.replace(vocab_size=VOCABULARY))
    return count.total + count.embedding


def quick(model: MoEMamba, _: Any) -> None:
    """Weights for a test of memory and speed, drawn where they are; the package draws them on the CPU."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            own = own_part(tensor)
            if name.endswith(("norm.weight", ".D")):
                nn.init.ones_(own)
            elif tensor.ndim < 2:
                nn.init.zeros_(own)
            else:
                nn.init.normal_(own, std=0.02)


def tokens(folder: str, processes: Processes) -> dict[str, str]:
    """Random tokens of a vocabulary of words, as files."""
    place = Path(folder)

    def write() -> None:
        words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(place / "tokenizer.json"))
        draws = np.random.default_rng(0).integers(0, VOCABULARY, 1 << 22)
        draws.astype("<u2").tofile(place / "train.bin")
        draws[: (1 << 20) + 1].astype("<u2").tofile(place / "held.bin")

    processes.once(write)
    files = {"data": "train.bin", "validation": "held.bin", "tokenizer": "tokenizer.json"}
    return {field: str(place / name) for field, name in files.items()}


def table(out: Path) -> None:
    """What was found, side by side."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}
    one, two = found.get("same-1", {}), found.get("same-2", {})
    summary: dict[str, Any] = {}
    for name in two:
        apart, _, way = name.rpartition(", ")
        if pair := one.get(f"{apart}, one"):
            losses = [abs(a - b) for (a, _), (b, _) in zip(pair, two[name], strict=True)]
            norms = [abs(a - b) / a for (_, a), (_, b) in zip(pair, two[name], strict=True)]
            print(
                f"{apart:24} {way:11} first {pair[0][0]:.6f} {two[name][0][0]:.6f}  last {pair[-1][0]:.6f} "
                f"{two[name][-1][0]:.6f}  apart at most: loss {max(losses):.1e}, gradient's norm {max(norms):.1e}"
            )
            summary[name] = [max(losses), max(norms)]
    for name, values in found.items():
        if name.startswith(("speed", "long")):
            each = values["tokens_per_second"]
            values["median"] = statistics.median(each[2:])
            print(f"{name:28} {values['median']:12,.0f} tokens/s  {values['peak_gib']} GiB  {each}")
            print(*values.pop("profile"), sep="\n")
        elif name.startswith("large"):
            print(name, values)
        else:
            continue
        summary[name] = values
    for name in (name for name in found if name.startswith(("speed-2", "long-2"))):
        for base in (base for base in found if base.startswith(f"{name.partition('-')[0]}-1")):
            summary[f"{name} over {base}"] = round(found[name]["median"] / found[base]["median"], 3)
            print(f"{name} over {base}: {summary[f'{name} over {base}']}")
    print(json.dumps(summary))


def every(gpus: int) -> None:
    """`same` and `speed` on one GPU and on all of this machine, side by side."""
    with tempfile.TemporaryDirectory() as out:
        for case in ("same", "speed", "long"):
            for count in (1, gpus):
                launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__]
                subprocess.run([sys.executable, *launch, case, out], check=True)
        table(Path(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("same", "speed", "long", "large", "table"), nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--shard", default="none", choices=("none", "parameters"))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cuda-graph", default="auto", choices=("auto", "off"), help="of `speed` with one process")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the sequence of `long`")
    parser.add_argument("--label", default="", help="ends the name of the JSON file")
    options = parser.parse_args()
    if options.case is None and torch.cuda.device_count() < 2:
        print(json.dumps({"skipped": "this benchmark needs two GPUs"}))
        return
    if options.case is None:
        every(torch.cuda.device_count())
        return
    if options.out is None:
        parser.error("OUT is missing: the folder of the JSON files")
    if options.case == "table":
        table(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with join("auto") as processes:
        folder = processes.once(lambda: tempfile.mkdtemp())
        match options.case:
            case "same":
                found = same(processes, folder)
            case "speed":
                found = speed(processes, folder, options.shard, options.profile, options.cuda_graph)
            case "long":
                found = speed(processes, folder, profile=options.profile, long=options.tokens)
            case _:
                found = large(processes, folder)
        if processes.first:
            file = options.out / f"{options.case}-{processes.size}{options.label}.json"
            file.write_text(json.dumps(found))
            print(json.dumps(found)[:2000])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
