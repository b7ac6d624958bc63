"""Decoding on a GPU, what is chosen unasked beside `ops.backend("triton")`: `decoding.py --gpu`, for one H200.

Steps as CUDA graphs over the engine's slots, both sides in turns in one process, rows reading different text: pairs of
bytes of Python's standard library, whatever the model would say. First what the head sees and the states that are left
are compared over eight steps, in float32 and bfloat16, for every number of rows; then are printed, side by side, tokens
a second, experts hit, launches a step, and what an expert layer takes, which is (step of ME x 8 - step of M x 8) / 8,
beside what its weights take at 4.2 TB/s. Then `transformer-25m` after 64 and 32,768 tokens. `--tune` tries other cuts
of the kernels of an expert layer instead. On a CPU everything runs once, eagerly, with tiny models, in Triton's
interpreter (`TRITON_INTERPRET=1`; with numpy 2.4 `tests/conftest.py` has to be imported first): a rehearsal, whose
times mean nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDES = {"unasked": None, "asked": "triton"}
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 6e-2}
BANDWIDTH = 4.2e12
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def text(rows: int, length: int, vocabulary: int) -> Tensor:
    """(rows, length) tokens of real text, each row another part of it."""
    needed, found = rows * length * 2, bytearray()
    for path in itertools.cycle(sorted(Path(os.__file__).parent.glob("*.py"))):
        found += path.read_bytes()
        if len(found) >= needed:
            break
    pairs = torch.frombuffer(found[:needed], dtype=torch.uint8).long().view(rows, length, 2)
    return ((pairs[..., 0] * 256 + pairs[..., 1]) % vocabulary).to(DEVICE)


def build(name: str, tiny: bool, dtype: torch.dtype, **changes: Any) -> Any:
    from moemamba import MoEMamba, preset

    torch.manual_seed(0)
    config = preset(name.replace("25m", "tiny") if tiny else name, **changes)
    model = MoEMamba(config).to(DEVICE, dtype).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "balance_bias"):  # an untrained router has favourites, which depend on little of the text
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


class Side:
    """Steps of some rows, which read `tokens` from `context` on, with a backend asked for or not."""

    def __init__(self, model: Any, tokens: Tensor, context: int, backend: str | None):
        from moemamba import ops
        from moemamba.inference.graph import Stepper
        from moemamba.inference.slots import Slots
        from moemamba.layers import LAYERS

        letters = [letter for layers in model.config.layers for letter in layers]
        kinds = [LAYERS[letter] for letter in letters if LAYERS[letter].state_type is not None]
        self.model, self.tokens, self.ops, self.backend = model, tokens, ops, backend
        self.rows, self.slots = len(tokens), Slots(kinds, len(tokens), DEVICE)
        self.slots.reserve(tokens.shape[1])
        most = max(1, (1 << 19) // context)  # rows that are read at once
        with torch.inference_mode():
            for part in tokens[:, :context].split(most):
                state = model.backbone(part)[1]
                with ops.backend(backend):  # whose buffers it makes
                    self.slots.put(state, tokens[self.slots.live : self.slots.live + len(part), context])
            self.slots.places.fill_(context)
        self.stepper = Stepper(self.slots, False, padded=True)
        self.graph: Any = None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One token of every row; returns what the head sees."""
        with self.ops.backend(self.backend):
            hidden, _ = self.stepper._compute(self.model, self.rows, True)
            place = self.slots.places % self.tokens.shape[1]
            self.slots.tokens.copy_(self.tokens.gather(1, place[:, None])[:, 0])
        return hidden

    def again(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def capture(self) -> None:
        for _ in range(2):
            self.step()
        if ON_GPU:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()


def timed(run: Callable[[], None], count: int) -> float:
    """Seconds of one of `count` calls."""
    if not ON_GPU:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def launches(side: Side) -> float | None:
    """Kernels of a step."""
    if not ON_GPU:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(4):
            side.again()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    return sum(event.count for event in kernels) / 4


def check(name: str, model: Any, tokens: Tensor, context: int) -> float:
    """The relative distance between the sides over eight steps, row by row: hidden vectors, then states.

    A choice between experts that are nearly equal may fall either way, and its row goes its own way from then on: so of
    all distances the middle one counts in bfloat16, and all but the largest 2% in float32.
    """
    one, other = (Side(model, tokens, context, backend) for backend in SIDES.values())
    found, steps = [], min(8 if ON_GPU else 2, tokens.shape[1] - context - 1)

    def compare(a: Tensor, b: Tensor) -> None:
        a, b = (x.flatten(1).double() for x in (a, b))
        found.append((a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-9))

    for _ in range(steps):
        compare(one.step().clone(), other.step())
    for mixer, same in zip(one.slots.mixers, other.slots.mixers, strict=True):
        for a, b in zip(mixer, same, strict=True):
            compare(a, b)
    dtype, distances = model.embedding.weight.dtype, torch.cat(found)
    off = float(distances.quantile(0.5 if dtype == torch.bfloat16 else 0.98))
    print(f"{name}, {len(tokens)} rows, {dtype}: off by {off:.1e}, at most {distances.max():.1e}", flush=True)
    if not off < CLOSE[dtype]:
        sys.exit("refusing to time what is not the same")
    return off


@torch.inference_mode()
def hit(model: Any, tokens: Tensor, context: int) -> float:
    """Experts that a layer's rows visit in a step."""
    record: list[Any] = []
    state = model(tokens[:, : min(context, 64)]).state
    model(tokens[:, context : context + 1], state, record=record)
    return sum(len(choice.indices.unique()) for choice in record) / max(1, len(record))


def measure(name: str, model: Any, tokens: Tensor, context: int, sides: dict[str, str | None], turns: int) -> Any:
    """Of each side seconds of a step and launches."""
    made = {side: Side(model, tokens, context, backend) for side, backend in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in made}
    left = tokens.shape[1] - context - 20
    for side in made.values():
        side.capture()
        timed(side.again, 5)
    for _ in range(turns):
        for label, side in made.items():
            times[label].append(timed(side.again, max(1, left // (turns + 1))))
    found = {
        label: {"us": round(1e6 * statistics.median(each), 1), "launches": launches(made[label])}
        for label, each in times.items()
    }
    for label, row in found.items():
        row["tokens/s"] = round(1e6 * len(tokens) / row["us"])
        print(f"{name}, {len(tokens)} rows after {context}, {label}: {row}", flush=True)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    tiny, batches = not ON_GPU, options.batches or ([1, 16, 64, 256, 1024] if ON_GPU else [1, 3, 20])
    context, more = (64, 320) if ON_GPU else (6, 24)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    experts = {"n_experts": 4} if tiny else {"n_experts": 32}
    blocks = {"n_blocks": 1} if tiny else {}
    models: dict[str, dict[str, Any]] = {
        "mamba-25m": {"pattern": "M", "n_blocks": 1 if tiny else 16},
        "half of it": {"pattern": "M", "n_blocks": 1 if tiny else 8},
        "moe-mamba-25m": experts | blocks,
        "transformer-25m": blocks,
    }
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if ON_GPU else "cpu, a rehearsal"}
    for name, changes in models.items():
        preset = "mamba-25m" if name == "half of it" else name
        both = name in ("moe-mamba-25m", "transformer-25m")
        if both:
            wide = build(preset, tiny, torch.float32, **changes)
            for rows in (1, 3, 17, 80, 300) if ON_GPU else (3,):
                check(name, wide, text(rows, context + 20, wide.config.vocab_size), context)
            del wide
        model = build(preset, tiny, dtype, **changes)
        vocabulary = model.config.vocab_size
        for rows in batches:
            tokens = text(rows, context + more, vocabulary)
            if both:
                check(name, model, tokens[:, : context + 20], context)
            sides = SIDES if both else {"unasked": None}
            row = results[f"{name}, {rows}"] = measure(name, model, tokens, context, sides, options.turns)
            if name == "moe-mamba-25m":
                row["experts hit"] = round(hit(model, tokens, context), 1)
                layers = [layer for layer in model.config.layers if "E" in layer]
                down = next(p for key, p in model.named_parameters() if key.endswith("down_proj"))
                floor = row["experts hit"] * 2 * down[0].numel() * down.element_size() / BANDWIDTH * 1e6
                row["floor of an expert layer, us"] = round(floor, 1)
                beside, whole = (results[f"{key}, {rows}"]["unasked"] for key in ("half of it", "mamba-25m"))
                for label in SIDES:
                    own = (row[label]["us"] - beside["us"]) / len(layers)
                    row[label] |= {
                        "us of an expert layer": round(own, 1),
                        "over its floor": round(own / floor, 2),
                        "share of a step": round(own * len(layers) / row[label]["us"], 2),
                        "tokens/s over mamba-25m": round(whole["us"] / row[label]["us"], 3),
                    }
                print(f"{name}, {rows} rows: {row}", flush=True)
        if name == "transformer-25m":
            long = 32_768 if ON_GPU else 40
            for rows in (1, 16) if ON_GPU else (2,):
                tokens = text(rows, long + 128, vocabulary)
                check(name, model, tokens[:, : long + 20], long)
                results[f"{name}, {rows}, {long}"] = measure(name, model, tokens, long, SIDES, options.turns)
        del model
    return results


@torch.inference_mode()
def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of an expert layer alone with other cuts, the best first; its weights lie in no cache."""
    from moemamba import ops
    from moemamba.ops.kit.triton_step import Cut
    from moemamba.ops.moe_step import triton as kernels

    d, f, e, layers = (512, 1536, 32, 8) if ON_GPU else (32, 48, 4, 1)
    dtype = torch.bfloat16 if ON_GPU else torch.float32

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(dtype)

    weights = [(draw(e, d), draw(e) / 9, draw(e, f, d), draw(e, d, f), 1) for _ in range(layers)]
    scale, results = draw(d).abs() + 1, {}
    many = [Cut(r, c, n, w) for r in (16, 32, 64) for c in (16, 32, 64) for n in (64, 128, 256) for w in (4, 8)]
    few = [Cut(1, c, n, w) for c in (2, 4, 8, 16, 32) for n in (512, 1024, 2048) for w in (4, 8)]
    plans: list[tuple[int, str, list[Any]]] = [(1, "UP_FEW", few), (1, "DOWN_FEW", few), (1, "ALONE", [0, 264])]
    plans += [(1, "ROUTER", [2048, 4096, 8192, 16384]), (16, "FEW", [0, 16]), (64, "STAGES", [2, 3, 4, 5, 6])]
    plans += [(rows, name, many) for rows in (64, 256, 1024) for name in ("UP", "DOWN")]
    for rows, name, cuts in plans if ON_GPU else [(2, "UP_FEW", few[:2]), (20, "UP", many[:1])]:
        x, before, found = draw(rows, 1, d), getattr(kernels, name), []
        for how in cuts:
            if name in ("UP", "DOWN") and how.rows not in (16, 16 << (rows > 512), 16 << 2 * (rows > 512)):
                continue
            setattr(kernels, name, {None: how} if name in ("UP", "DOWN") else how)

            def go(x: Tensor = x) -> None:
                y = x
                with ops.backend("triton"):
                    for each in weights:
                        y = ops.moe_step(y, *each, activation="relu", norm_weight=scale, norm_bias=scale)

            try:
                go()
                run = go
                if ON_GPU:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        go()
                    run = graph.replay
                    timed(run, 5)
                found.append((round(1e6 * timed(run, 50) / layers, 2), str(how)))
            except Exception as error:  # what does not fit is no candidate
                print(f"{name} {how}: {type(error).__name__}", flush=True)
        setattr(kernels, name, before)
        found.sort()
        results[f"{rows} rows, {name}"] = found[:6]
        print(f"{rows} rows, {name}: {found[:6]}, the worst {found[-1:]}", flush=True)
    return results


def main(options: argparse.Namespace) -> None:
    begun = time.time()
    results = tune(options) if options.tune else run(options)
    print(json.dumps(results | {"seconds": round(time.time() - begun)}))
