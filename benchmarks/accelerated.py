"""transformers' Mamba as it is and on our kernels, beside our own model: `accelerated.py [--device cuda]`.

One model of random weights, in the shape of the preset `mamba-small` (12 layers of width 256) and in ours and
transformers' classes alike. Before anything is timed, losses, gradients and greedy tokens must agree.

- training: forward, backward and AdamW of `--batch` rows of `--length` tokens;
- decoding: `generate` of one row, greedily, and bare calls of the model with its cache, one token each.

Everything in turns, `--rounds` of them; what is shown is the median of a round's time, and ratios are medians of the
ratios within a round, so that a busy machine disturbs both sides alike. With mambapy, transformers' scan on a CPU is
that package's, without it a loop over positions; where mambapy is not installed that contender is left out.
`--cpu-time` counts seconds of the processor, which another process takes none of, instead of the clock's; give it with
OMP_NUM_THREADS=1. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from moemamba import ModelConfig, MoEMamba
from moemamba.integrations.transformers import accelerate

LAYERS, D, VOCABULARY = 12, 256, 257
PROMPT, NEW, STEPS = 64, 64, 48
TRAINING = ("ours", "accelerated", "mambapy", "transformers")
DECODING = ("accelerated", "transformers")


def build(device: str) -> tuple[MoEMamba, MambaForCausalLM]:
    """The same weights twice."""
    torch.manual_seed(0)
    shape = {"hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    none = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    theirs = MambaForCausalLM(MambaConfig(**shape, **none, tie_word_embeddings=False, use_mambapy=True))
    ours = MoEMamba(ModelConfig("M", LAYERS, D, VOCABULARY))
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("backbone.").replace("embeddings.", "embedding.").replace("norm_f.", "norm.")
        weights[name.replace("lm_head.", "head.").replace(".mixer.", ".branches.0.")] = tensor
    ours.load_state_dict(weights)
    return ours.to(device), theirs.to(device)


@contextmanager
def as_contender(name: str, theirs: MambaForCausalLM) -> Iterator[None]:
    """transformers' model as one of the contenders."""
    for layer in theirs.backbone.layers:
        layer.mixer.use_mambapy = name == "mambapy"
    if name == "accelerated":
        with accelerate(theirs):
            yield
    else:
        yield


def loss_of(name: str, ours: MoEMamba, theirs: MambaForCausalLM, x: torch.Tensor) -> torch.Tensor:
    if name != "ours":
        return theirs(x, labels=x, use_cache=False).loss
    targets = F.pad(x[:, 1:], (0, 1), value=-100)
    loss = ours(x, targets=targets).loss
    assert loss is not None
    return loss


def check(ours: MoEMamba, theirs: MambaForCausalLM, names: tuple[str, ...], x: torch.Tensor) -> None:
    """Losses, gradients and tokens of all contenders."""
    found = {}
    for name in names:
        ours.zero_grad()
        theirs.zero_grad()
        with as_contender(name, theirs):
            loss = loss_of(name, ours, theirs, x[:2, :48])
            loss.backward()
        model: Any = ours if name == "ours" else theirs
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        found[name] = (loss.item(), norm.item())
    for name, (loss, norm) in found.items():
        first = found[names[0]]
        assert abs(loss - first[0]) < 1e-3 and abs(norm / first[1] - 1) < 1e-2, (name, found)
    tokens = []
    for name in DECODING:
        with as_contender(name, theirs):
            tokens.append(generate(theirs.eval(), x))
    assert tokens[0].equal(tokens[1])


@torch.no_grad()
def generate(theirs: MambaForCausalLM, x: torch.Tensor) -> torch.Tensor:
    return theirs.generate(x[:1, :PROMPT], max_new_tokens=NEW, do_sample=False)


@torch.no_grad()
def bare(theirs: MambaForCausalLM, x: torch.Tensor) -> Callable[[], None]:
    """Calls of one token each, after a prompt."""
    out = theirs(x[:1, :PROMPT], use_cache=True)
    name = next(name for name in ("cache", "cache_params") if name in out)
    cache, token = out[name], x[:1, :1]

    def steps() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                theirs(token, use_cache=True, **{name: cache})

    return steps


clock = time.perf_counter


def seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def train(
    ours: MoEMamba, theirs: MambaForCausalLM, names: tuple[str, ...], x: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    optimizers = {
        name: torch.optim.AdamW((ours if name == "ours" else theirs).parameters(), 1e-5, fused=True) for name in names
    }

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        loss_of(name, ours, theirs, x).backward()
        optimizers[name].step()

    ours.train()
    theirs.train()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            with as_contender(name, theirs):
                taken = seconds(lambda name=name: step(name), x.device.type)  # type: ignore[misc]
            if turn:
                times[name].append(taken)
    return times


def decode(theirs: MambaForCausalLM, x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    theirs.eval()
    times: dict[str, list[float]] = {f"{name}, {way}": [] for way in ("generate", "bare") for name in DECODING}
    for turn in range(rounds + 1):
        for name in DECODING:
            with as_contender(name, theirs):
                steps = bare(theirs, x)
                taken = {
                    "generate": seconds(lambda: generate(theirs, x), x.device.type) / NEW,
                    "bare": seconds(steps, x.device.type) / STEPS,
                }
            if turn:
                for way, each in taken.items():
                    times[f"{name}, {way}"].append(each)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", default="", help="contenders of training to leave out, behind commas")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
    logging.set_verbosity_error()
    absent = [] if find_spec("mambapy") else ["mambapy"]  # transformers would run its loop instead, and say nothing
    names = tuple(name for name in TRAINING if name not in (*options.without.split(","), *absent))
    ours, theirs = build(options.device)
    x = torch.randint(1, VOCABULARY, (options.batch, options.length), device=options.device)
    check(ours, theirs, names, x)
    training = train(ours, theirs, names, x, options.rounds)
    decoding = decode(theirs, x, options.rounds)
    for name, times in (training | decoding).items():
        print(f"{name:28}{1e3 * statistics.median(times):10.2f} ms")
    fast = training["accelerated"]
    found = {f"training, {name} / accelerated": ratio(training[name], fast) for name in names if name != "accelerated"}
    for way in ("generate", "bare"):
        found[f"decoding, {way}"] = ratio(decoding[f"transformers, {way}"], decoding[f"accelerated, {way}"])
    print(json.dumps({"device": options.device, "rounds": options.rounds} | found))


if __name__ == "__main__":
    main()
