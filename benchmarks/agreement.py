"""Whether training is the same on every backend: 200 steps of `moe-mamba-tiny`, 8 x 64 tokens, from one start.

    python benchmarks/agreement.py [--device cpu] [--steps 200]

Every backend that can run here against the reference, in float32 and, on a GPU, in bfloat16: how far the losses of
single steps lie apart. A routing choice that falls the other way, as it may between any two orders of summation, parts
float32 runs after some steps. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from moemamba import TrainConfig, ops, preset
from moemamba.host.progress import Report
from moemamba.ops.choice import BACKENDS, why_not
from moemamba.training import loop

NATURAL = "natural choice"  # the fastest backend for each op, as without asking
TOGETHER = 20  # first steps, listed by themselves


def losses(backend: str, dtype: str, device: str, steps: int) -> list[float]:
    """Of every step, on one backend; the reference's operations do not fit into a CUDA graph."""
    with tempfile.TemporaryDirectory() as folder, nullcontext() if backend == NATURAL else ops.backend(backend):
        config = TrainConfig(
            preset("moe-mamba-tiny"), data=argparse.__file__, run=folder, steps=steps, batch_size=8, context=64,
            log_every=1, eval_every=steps, eval_tokens=1024, dtype=dtype, device=device, cuda_graph="off",
        )  # fmt: skip
        loop.train(config, report=Report(silent=True))
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    loop.take = lambda *arguments: None  # no checkpoints, which would only take time
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in ("float32", "bfloat16") if asked.device == "cuda" else ("float32",):
        runs = {
            name: torch.tensor(losses(name, dtype, asked.device, asked.steps))
            for name in (*BACKENDS, NATURAL)
            if name == NATURAL or why_not(name, asked.device) is None
        }
        reference = runs.pop("reference")
        found[dtype] = {"reference": {"last 20": reference[-TOGETHER:].mean().item()}}
        for name, run in runs.items():
            apart = (run - reference).abs()
            found[dtype][name] = {
                "first 20, most": apart[:TOGETHER].max().item(),
                "all, mean": apart.mean().item(),
                "all, most": apart.max().item(),
                "last 20": run[-TOGETHER:].mean().item(),
            }
            print(dtype, name, {key: f"{value:.2g}" for key, value in found[dtype][name].items()}, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
