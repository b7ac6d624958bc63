"""Decoding on a GPU, beside mamba-ssm's: `inference.py [--batches 1 64 256] [--only moe] [--profile]`.

A prompt of 64 tokens, 256 new ones, the most likely each; M x 16, d_model 512, a vocabulary of 50,257, bfloat16:

- ours through `generate` as a user calls it, the prompt included, and the rate of the tokens after the first;
- mamba-ssm's step rebuilt from its ops on the same weights (residual addition and norm as one, `causal_conv1d_update`,
  `selective_state_update`, products by `F.linear`, argmax) as a CUDA graph, the way its own `generate` decodes;
- ours with 32 experts (8 x (Mamba + experts)), which mamba-ssm has not.

Before anything is timed, the two must have the same logits, and the same tokens in float32. Then milliseconds to the
first token of prompts of 64 and 16,384 tokens. Medians; the sides take turns. The last line is one JSON object.

`inference.py --contexts 1024 8192 32768 131072 [--batches 1 16 64] [--tiny] [--quick] [--out FILE]` measures the four
25M models far into their sequences instead; see contexts.py. It runs on a CPU too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contexts import contexts, ratios
from torch import Tensor

from moemamba import MoEMamba, preset
from moemamba.inference import Engine, Request, Sampling, stream

try:
    from causal_conv1d import causal_conv1d_update
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError as error:
    missing: str | None = f"mamba-ssm is left out: {error}"
else:
    missing = None

BATCHES = [1, 64, 256]
VOCABULARY, PROMPT, NEW, LONG = 50_257, 64, 256, 16_384
CLOSE = 5e-2  # relative error of the logits, bfloat16
TURNS = 3


def build(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> MoEMamba:
    """Weights for decoding, the same whatever the dtype."""
    torch.manual_seed(0)
    config = preset(name).replace(norm="rmsnorm", final_norm=True, vocab_size=VOCABULARY, **changes)
    return MoEMamba(config).cuda().to(dtype).eval().requires_grad_(False)


class MambaSSM:
    """mamba-ssm's decoding step over the weights and states of one of our models, as a CUDA graph."""

    def __init__(self, model: MoEMamba, batch: int):
        self.model, self.token = model, torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.mixers: list[Any] = [layer.branches[0] for layer in model.layers]
        dtype = model.embedding.weight.dtype
        self.conv = [torch.zeros(batch, m.d_inner, 4, device="cuda", dtype=dtype) for m in self.mixers]
        self.ssm = [torch.zeros(batch, m.d_inner, m.d_state, device="cuda") for m in self.mixers]
        self.A = [-torch.exp(m.A_log.float()) for m in self.mixers]
        self.logits = torch.empty(0)
        for _ in range(2):
            self.step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def begin(self, tokens: Tensor) -> None:
        """Take the prompt in (b, l), and the most likely next token."""
        hidden, state, _ = self.model.backbone(tokens)
        for conv, ssm, mixer in zip(self.conv, self.ssm, state.mixers, strict=True):
            conv[:, :, 1:] = mixer[0]  # theirs holds the current input too
            ssm.copy_(mixer[1])
        self.token.copy_(self.model.head(hidden[:, -1]).argmax(-1))

    def step(self) -> None:
        hidden, residual = self.model.embedding(self.token), None
        for index, (layer, m) in enumerate(zip(self.model.layers, self.mixers, strict=True)):
            hidden, residual = self.norm(hidden, residual, layer.norm, True)
            u, z = F.linear(hidden, m.in_proj.weight).chunk(2, -1)
            u = causal_conv1d_update(u, self.conv[index], m.conv1d.weight.squeeze(1), m.conv1d.bias, "silu")
            dt, B, C = F.linear(u, m.x_proj.weight).split([m.dt_rank, m.d_state, m.d_state], -1)
            y = selective_state_update(
                self.ssm[index],
                u,
                F.linear(dt, m.dt_proj.weight),
                self.A[index],
                B,
                C,
                m.D,
                z=z,
                dt_bias=m.dt_proj.bias,
                dt_softplus=True,
            )
            hidden = F.linear(y, m.out_proj.weight)
        self.logits = F.linear(self.norm(hidden, residual, self.model.norm, False), self.model.head.weight)
        self.token.copy_(self.logits.argmax(-1))

    def norm(self, hidden: Tensor, residual: Tensor | None, norm: Any, prenorm: bool) -> Any:
        return rms_norm_fn(
            hidden, norm.weight, None, residual=residual, eps=norm.eps, prenorm=prenorm, residual_in_fp32=True
        )

    def generate(self, prompts: Tensor, count: int) -> tuple[list[list[int]], float]:
        """`count` tokens a row, and the seconds that all but the first took."""
        self.begin(prompts)
        rows = [self.token.clone()]
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count - 1):
            self.graph.replay()
            rows.append(self.token.clone())
        found = torch.stack(rows, 1).tolist()
        return found, time.perf_counter() - begun


def ours(model: MoEMamba, prompts: Tensor, count: int) -> tuple[list[list[int]], float, float]:
    """`generate`'s tokens, the seconds after the first token, and those of the whole call."""
    begun = time.perf_counter()
    steps: Iterator[list[int | None]] = stream(model, prompts.tolist(), count, Sampling(temperature=0))
    found = [next(steps)]
    first = time.perf_counter()
    found += steps
    end = time.perf_counter()
    return [list(row) for row in zip(*found, strict=True)], end - first, end - begun


def check(batch: int) -> dict[str, float]:
    """Logits after the prompt and three tokens in bfloat16, tokens in float32."""
    prompts = torch.randint(0, VOCABULARY, (batch, PROMPT), device="cuda")
    model = build("mamba-25m", pattern="M", n_blocks=16)
    theirs = MambaSSM(model, batch)
    found, _ = theirs.generate(prompts, 4)
    fed = torch.cat([prompts, torch.tensor(found, device="cuda")[:, :3]], 1)
    expected = model(fed).logits[:, -1].float()
    error = float((theirs.logits.float() - expected).norm() / expected.norm())
    model = build("mamba-25m", torch.float32, pattern="M", n_blocks=16)
    theirs = MambaSSM(model, batch)
    tokens, their_tokens = torch.tensor(ours(model, prompts, 64)[0]), torch.tensor(theirs.generate(prompts, 64)[0])
    same = float((tokens == their_tokens).float().mean())
    print(f"batch {batch}: logits off by {error:.1e}, tokens in float32 the same: {same:.3f}", flush=True)
    if not (error < CLOSE and same > 0.99):
        sys.exit("refusing to time what is not the same")
    return {"logits": error, "same tokens": same}


def decoding(model: MoEMamba, batch: int, theirs: MambaSSM | None) -> dict[str, float]:
    """Tokens per second of decoding, and of `generate` with the prompt."""
    prompts = torch.randint(0, VOCABULARY, (batch, PROMPT), device="cuda")
    times: dict[str, list[float]] = {"ours": [], "generate": [], "mamba_ssm": []}
    for _ in range(TURNS + 1):
        _, decode, whole = ours(model, prompts, NEW)
        times["ours"].append(decode)
        times["generate"].append(whole)
        if theirs is not None:
            times["mamba_ssm"].append(theirs.generate(prompts, NEW)[1])
    made = {"ours": NEW - 1, "generate": NEW, "mamba_ssm": NEW - 1}
    row = {name: round(batch * made[name] / statistics.median(t[1:])) for name, t in times.items() if t}
    row["us_per_step"] = round(1e6 * batch / row["ours"], 1)
    if theirs is not None:
        row["mamba_ssm_us_per_step"] = round(1e6 * batch / row["mamba_ssm"], 1)
        row["ratio"] = round(row["ours"] / row["mamba_ssm"], 2)
    return row


def first_token(model: MoEMamba, length: int) -> float:
    """Milliseconds from the call of `stream` to its first token."""
    prompt = [torch.randint(0, VOCABULARY, (length,)).tolist()]
    times = []
    for _ in range(TURNS + 1):
        begun = time.perf_counter()
        next(stream(model, prompt, NEW, Sampling(temperature=0)))
        times.append(time.perf_counter() - begun)
    return round(1e3 * statistics.median(times[1:]), 2)


def profile(model: MoEMamba, batch: int) -> None:
    """Microseconds and calls of each kernel of eight tokens, the prompt's left out."""
    engine = Engine(model, batch)
    for _ in range(batch):
        engine.submit(Request([0] * PROMPT, NEW, Sampling(temperature=0)))
    for _ in range(8):  # the prompts, and steps that are not captured
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(100):
        engine.step()
    end.record()
    torch.cuda.synchronize()
    print(f"batch {batch}: {start.elapsed_time(end) * 10:.1f} us a step")
    for event in sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:25]:
        print(f"{event.self_device_time_total / 8:9.1f} us {event.count / 8:6.1f} x {event.key[:80]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--only", choices=["mamba", "moe", "first"], help="one kind of case")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--contexts", type=int, nargs="+", help="measure the four models after so many tokens")
    parser.add_argument("--tiny", action="store_true", help="with --contexts: the presets for a laptop")
    parser.add_argument("--quick", action="store_true", help="with --contexts: two turns of two steps")
    parser.add_argument("--most", type=int, default=1 << 16, help="with --contexts: sequences to try at most")
    parser.add_argument("--out", type=Path, help="with --contexts: file for the JSON object")
    options = parser.parse_args()
    if options.contexts:
        batches = options.batches if options.batches != BATCHES else [1, 16, 64]
        found = contexts(options.contexts, batches, options.tiny, options.quick, options.most)
        found["ratios"] = ratios(found, 16 if 16 in batches else batches[-1])
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "this benchmark needs a GPU; benchmarks/cpu.py measures decoding on a CPU"}))
        return
    if missing:
        print(missing)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    makers: dict[str, Callable[[], MoEMamba]] = {
        "mamba": lambda: build("mamba-25m", pattern="M", n_blocks=16),
        "moe": lambda: build("moe-mamba-25m", n_experts=32),
    }
    with torch.inference_mode():
        for name, make in makers.items():
            if options.only not in (None, name, "first"):
                continue
            model = make()
            for batch in options.batches if options.only != "first" else []:
                beside = name == "mamba" and not missing
                if beside:
                    results[f"errors, batch {batch}"] = check(batch)
                theirs = MambaSSM(model, batch) if beside else None
                results[f"{name}, batch {batch}"] = row = decoding(model, batch, theirs)
                print(f"{name}, batch {batch}: {row}", flush=True)
                del theirs
                if options.profile:
                    profile(model, batch)
            if options.only in (None, "first"):
                results[f"{name}, ms to first token"] = {
                    length: first_token(model, length) for length in (PROMPT, LONG)
                }
                print(f"{name}, ms to first token: {results[f'{name}, ms to first token']}", flush=True)
            del model
            torch.cuda.empty_cache()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
