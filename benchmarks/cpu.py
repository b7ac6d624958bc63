"""MoEMamba on the CPU beside Hugging Face's Mamba, with and without mambapy, in one run: same shapes, same weights.

    pip install transformers mambapy && python benchmarks/cpu.py

Eight Mamba layers, d_model 256, a byte vocabulary, float32. Outputs and every gradient are compared before anything is
timed. The contestants take turns, so that whatever else the machine does falls on all of them; the best of the turns
counts. On a machine that others use too, `--busy --threads 1` counts the CPU seconds of this process instead of the
clock's. The last line is JSON.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MambaForCausalLM

from moemamba import ModelConfig, MoEMamba, ops

BATCH, LENGTH, LAYERS, D_MODEL, VOCAB = 8, 256, 8, 256, 256
PROMPT, NEW = 64, 64
LENGTHS = (1024, 4096, 16384, 65536)

clock = time.perf_counter


def contestants() -> tuple[MoEMamba, MambaForCausalLM]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    ours = MoEMamba(ModelConfig("M", n_blocks=LAYERS, d_model=D_MODEL, vocab_size=VOCAB, tie_embeddings=False))
    config = transformers.MambaConfig(
        hidden_size=D_MODEL, num_hidden_layers=LAYERS, vocab_size=VOCAB, tie_word_embeddings=False
    )
    theirs = MambaForCausalLM(config)
    theirs.load_state_dict({their_name(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def their_name(name: str) -> str:
    if name.startswith("layers."):
        return "backbone." + name.replace("branches.0", "mixer")
    return {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}.get(
        name, "lm_head.weight"
    )


MAMBAPY = importlib.util.find_spec("mambapy") is not None


def use_mambapy(model: MambaForCausalLM, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "use_mambapy"):
            module.use_mambapy = on


def check(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    error = (actual - expected).abs().max().item() / expected.abs().max().clamp(min=1e-6).item()
    if not error < tolerance:
        raise SystemExit(f"{name} differs from transformers by {error:.1e} of its largest value: nothing is timed")


def take_turns(steps: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Best time of each in seconds, after one call that does not count."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(turns + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def training(turns: int, loop: bool) -> dict[str, float]:
    """Tokens a second of a training step: forward, loss, backward, clipping, AdamW."""
    ours, theirs = contestants()
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))

    def our_loss() -> Tensor:
        loss = ours(tokens[:, :-1], targets=tokens[:, 1:]).loss
        assert loss is not None
        return loss

    def their_loss() -> Tensor:
        logits = theirs(tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    use_mambapy(theirs, MAMBAPY)
    losses = our_loss(), their_loss()
    for loss in losses:
        loss.backward()
    check("the loss", *losses)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        check(f"the gradient of {name}", parameter.grad, gradients[their_name(name)], 1e-3)

    def step(model: nn.Module, loss: Callable[[], Tensor], mambapy: bool | None = None) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            if mambapy is not None:
                use_mambapy(theirs, mambapy)
            optimiser.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

        return run

    sides = {"ours": step(ours, our_loss)}
    if MAMBAPY:
        sides["mambapy"] = step(theirs, their_loss, True)
    times = take_turns(sides, turns)
    if loop:
        start = clock()
        step(theirs, their_loss, False)()
        times["loop"] = clock() - start
    return {name: BATCH * LENGTH / seconds for name, seconds in times.items()}


@torch.inference_mode()
def decoding(turns: int) -> dict[str, float]:
    """Tokens a second of greedy decoding at batch 1."""
    ours, theirs = (model.eval() for model in contestants())
    prompt = torch.randint(0, VOCAB, (1, PROMPT))
    our_start, their_start = ours(prompt), theirs(prompt, use_cache=True)
    check("the prompt's logits", our_start.logits, their_start.logits)
    first = our_start.logits[:, -1:].argmax(-1)

    def our_run(record: list[Tensor] | None = None) -> None:
        token, state = first, our_start.state
        for _ in range(NEW):
            out = ours(token, state)
            token, state = out.logits[:, -1:].argmax(-1), out.state
            if record is not None:
                record.append(out.logits)

    cache = their_start.cache_params  # changes as it goes: later runs continue, which takes them the same time

    def their_run(record: list[Tensor] | None = None) -> None:
        token = first
        for _ in range(NEW):
            out = theirs(token, cache_params=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            if record is not None:
                record.append(out.logits)

    ours_logits: list[Tensor] = []
    theirs_logits: list[Tensor] = []
    our_run(ours_logits)
    their_run(theirs_logits)
    check("the logits of decoding", torch.cat(ours_logits, 1), torch.cat(theirs_logits, 1))
    times = take_turns({"ours": our_run, "transformers": their_run}, turns)
    return {name: NEW / seconds for name, seconds in times.items()}


def lengths(turns: int) -> list[dict[str, float]]:
    """One scan at batch 1: time, and peak memory beyond inputs and outputs as a multiple of u.

    The memory is that of a training step's forward pass, which keeps states for the backward pass.
    """
    rows = []
    for length in (LENGTHS[0], *LENGTHS):  # once more, since the first loads the kernels
        torch.manual_seed(0)
        width, n = 2 * D_MODEL, 16
        u, z = torch.randn(1, length, 2 * width).chunk(2, dim=-1)
        B, C = torch.randn(2, 1, length, n)
        inputs = (u, torch.randn(1, length, width), -torch.rand(width, n), B, C, torch.ones(width), z)
        before = peak_memory(reset=True)
        outputs = ops.selective_scan(u.detach().requires_grad_(), *inputs[1:])
        extra = peak_memory() - before - sum(t.numel() * t.element_size() for t in outputs)
        del outputs
        with torch.no_grad():
            seconds = take_turns({"ours": partial(ops.selective_scan, *inputs)}, turns)["ours"]
        rows.append({"length": length, "ms": 1e3 * seconds, "extra_over_u": extra / (4 * length * width)})
    return rows[1:]


def peak_memory(reset: bool = False) -> int:
    """Largest resident size of this process since the last reset, in bytes (Linux)."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed must not pass for memory that is not needed
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-loop", action="store_true", help="leave out transformers' loop over time (minutes)")
    parser.add_argument("--busy", action="store_true", help="count CPU seconds of this process")
    args = parser.parse_args()
    clock = time.process_time if args.busy else time.perf_counter
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    train, decode, by_length = training(args.turns, not args.no_loop), decoding(4 * args.turns), lengths(args.turns)
    for title, rates in (("training", train), ("decoding", decode)):
        for name, rate in rates.items():
            print(f"{title:9} {name:13} {rate:8.0f} tokens/s   ours is {rates['ours'] / rate:6.2f} times that")
    for row in by_length:
        print(
            f"scan of {row['length']:6} positions {row['ms']:8.2f} ms, {row['extra_over_u']:.2f} x u beside its outputs"
        )
    result = {
        "threads": args.threads,
        "clock": clock.__name__,
        "train_tokens_per_s": train,
        "train_vs_mambapy": train["ours"] / train["mambapy"] if MAMBAPY else "not installed: pip install mambapy",
        "decode_tokens_per_s": decode,
        "decode_vs_transformers": decode["ours"] / decode["transformers"],
        "scan": by_length,
        "us_per_position_1k_and_64k": [1e3 * row["ms"] / row["length"] for row in (by_length[0], by_length[-1])],
        "largest_extra_over_u": max(row["extra_over_u"] for row in by_length),
    }
    print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
