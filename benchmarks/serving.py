"""Serving on a CPU, in CPU time of one thread: `serving.py [--model moe-mamba-small] [--only poisson long ...]`.

- **poisson**: requests come at random, `--rate` a second, with prompts of 32, 128 or 512 tokens and 32 to 128 new ones,
  and are answered in 16 slots; beside it the same one after another, as `generate` does. The clock is virtual: the CPU
  time of the work, so that nothing else counts. No side can make more tokens a second than are asked for.
- **long**: a prompt of 32,768 tokens arrives while 8 answers are under way: how long these wait for each token.
- **again**: a prompt of 8,192 tokens, and the same once more: time to the first token.
- **many**: 64 sequences of 32,768 tokens at once: bytes of their states, tokens a second.
- **http**: what a request and a token cost besides, in a server of a small model: CPU time of its process with clients,
  less that of the engine alone with the same requests.
- **peers**, with `--peers` or by name: the requests of poisson, all at once, in transformers and in llama.cpp with the
  same weights (a `-portable` preset, or `mamba-small`); greedy tokens are compared first. See `peers.py`.

Random weights, a vocabulary of 257. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peers import compared

from moemamba import MoEMamba, load, preset, save
from moemamba.inference import Engine, Request, Sampling, StateCache
from moemamba.serving.config import Limits
from moemamba.text import ByteTokenizer

GREEDY = Sampling(temperature=0)
COUNT, SLOTS, TURNS = 96, 16, 3
VOCABULARY = 257
LONG, AGAIN, STREAMS, MANY = 32_768, 8_192, 8, 64
REQUESTS, TOKENS, CLIENTS = 400, 32, 16


def build(name: str, weights: str = "float32") -> MoEMamba:
    torch.manual_seed(0)
    model = MoEMamba(preset(name, vocab_size=VOCABULARY)).eval().requires_grad_(False)
    if weights != "int8":
        return model
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/model", model, ByteTokenizer())
        return load(f"{folder}/model", weights="int8")[0].eval()


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCABULARY - 1) for _ in range(count)]


def quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def milliseconds(values: Sequence[float], *parts: float) -> dict[str, float]:
    return {f"p{100 * part:g}": round(1e3 * quantile(values, part), 1) for part in parts}


def served(model: MoEMamba, slots: int = SLOTS, cache: StateCache | None = None) -> Engine:
    """An engine with a server's defaults, on the clock of these measurements."""
    limits = Limits()
    engine = Engine(model, slots, limits.chunk, alone=limits.chunk_alone, gap=limits.gap, cache=cache)
    engine.clock = time.process_time
    return engine


Arrivals = list[tuple[float, list[int], int]]


def arrivals(rate: float) -> Arrivals:
    """When each request comes, its prompt, and how many tokens it wants."""
    draw, now, found = random.Random(0), 0.0, []
    for _ in range(COUNT):
        now += draw.expovariate(rate)
        found.append((now, tokens(draw, draw.choice((32, 128, 512))), draw.choice((32, 64, 128))))
    return found


class Clock:
    """Goes on while something is computed, and can be put forward."""

    def __init__(self) -> None:
        self._offset = -time.process_time()

    @property
    def now(self) -> float:
        return time.process_time() + self._offset

    def wait_for(self, then: float) -> None:
        self._offset += max(0.0, then - self.now)


def played(engine: Engine, asked: Arrivals, most: int) -> dict[str, Any]:
    """Requests as they come, `most` of them at once."""
    clock, waiting = Clock(), list(asked)
    came: dict[int, float] = {}
    last: dict[int, float] = {}
    first: list[float] = []
    between: list[float] = []
    count = 0
    while waiting or engine.busy:
        if not engine.busy and waiting:
            clock.wait_for(waiting[0][0])
        while (
            waiting and waiting[0][0] <= clock.now and len(came) - len(last) < 10_000 and (most > 1 or not engine.busy)
        ):
            then, prompt, new = waiting.pop(0)
            came[engine.submit(Request(prompt, new, GREEDY))] = then
        events, now = engine.step(), clock.now
        for event in events:
            (between if event.request in last else first).append(now - last.get(event.request, came[event.request]))
            last[event.request] = now
            count += 1
    return {
        "tokens/s": round(count / clock.now),
        "first token, ms": milliseconds(first, 0.5, 0.99),
        "between tokens, ms": milliseconds(between, 0.5, 0.99),
        "experts hit by prompts": [int((load > 0).sum()) for load in engine.load][:4],
    }


def poisson(model: MoEMamba, rate: float) -> dict[str, Any]:
    asked = arrivals(rate)
    played(served(model), asked[:4], SLOTS)  # kernels
    sides: dict[str, Any] = {"asked for, tokens/s": round(sum(new for _, _, new in asked) / asked[-1][0])}
    for turn in range(TURNS):
        for side, slots in (("one after another", 1), ("engine", SLOTS)):
            found = played(served(model, slots), asked, slots)
            if turn == 0 or found["tokens/s"] > sides[side]["tokens/s"]:
                sides[side] = found
    return sides


def long_prompt(model: MoEMamba) -> dict[str, Any]:
    """Gaps between the tokens of answers under way, before a long prompt comes and while it is read."""
    draw = random.Random(1)
    engine = served(model, cache=StateCache(256 << 20))
    streams = {engine.submit(Request(tokens(draw, 32), 1 << 20, GREEDY)) for _ in range(STREAMS)}
    for _ in range(50):
        engine.step()
    gaps: dict[str, list[float]] = {"alone": [], "with the prompt": []}
    number = -1
    began = time.process_time()
    for side, steps in (("alone", 300), ("with the prompt", 1 << 20)):
        if side != "alone":
            number, began = engine.submit(Request(tokens(draw, LONG), 1, GREEDY)), time.process_time()
        for _ in range(steps):
            before = time.process_time()
            events = engine.step()
            gaps[side].append(time.process_time() - before)
            if any(event.request == number for event in events):
                break
    engine.abort(*streams)
    found: dict[str, Any] = {side: milliseconds(own, 0.5, 0.99, 0.999, 1) for side, own in gaps.items()}
    return {**found, "first token of the prompt, s": round(time.process_time() - began, 2)}


def same_again(model: MoEMamba) -> dict[str, Any]:
    draw = random.Random(2)
    engine = served(model, cache=StateCache(256 << 20))
    prompt, found = tokens(draw, AGAIN), {}
    for turn in ("first", "again", "again, with 5 tokens more"):
        before = time.process_time()
        asked = prompt + ([1, 2, 3, 4, 5] if "more" in turn else [])
        engine.submit(Request(asked, 1, GREEDY))
        (event,) = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
        assert event.reading is not None
        took = round(1e3 * (time.process_time() - before), 1)
        found[turn] = {"ms to the first token": took, "cached_tokens": event.reading.cached}
    return found


def many_long(model: MoEMamba) -> dict[str, Any]:
    draw = random.Random(3)
    engine = Engine(model, MANY, 512)
    engine.submit(Request(tokens(draw, LONG), 0, keep=True))
    (event,) = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert event.reading is not None and event.reading.snapshot is not None
    state = event.reading.snapshot
    for number in range(MANY):
        engine.submit(Request([number], 40, GREEDY, start=state))
    for _ in range(8):
        engine.step()
    before, count = time.process_time(), 0
    while engine.live == MANY and count < 20 * MANY:
        count += len(engine.step())
    rate = count / (time.process_time() - before)
    return {
        "tokens before": state.position,
        "bytes of one state": state.state.nbytes,
        "MB of all": round(MANY * state.state.nbytes / 1e6, 1),
        "tokens/s": round(rate),
    }


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def asked_over_http(port: int, bodies: Sequence[str]) -> None:
    left = iter(bodies)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in left:
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            answer = b""
            while not answer.endswith((b"0\r\n\r\n", b"}}}")):
                answer += await reader.read(1 << 16)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def over_http() -> dict[str, Any]:
    model, draw = build("moe-mamba-tiny"), random.Random(4)
    prompts = [tokens(draw, 16) for _ in range(REQUESTS)]
    engine = served(model, cache=StateCache(256 << 20))

    def alone(new: int) -> float:
        """The same requests as clients ask them: each the next once one of its own is done."""
        before, left, under_way = time.process_time(), iter(prompts), 0
        while True:
            for prompt in islice(left, CLIENTS - under_way):
                engine.submit(Request(prompt, new, GREEDY))
                under_way += 1
            if not under_way:
                return time.process_time() - before
            under_way -= sum(event.kept is not None for event in engine.step())

    found: dict[str, Any] = {}
    for kind, new in (("engine alone, s", TOKENS), ("engine alone, one token, s", 1)):
        found[kind] = round(min(alone(new) for _ in range(TURNS)), 2)
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/model", model, ByteTokenizer())
        command = [sys.executable, "-m", "moemamba", "serve", f"{folder}/model", "--port", "0", "--allow-host", "x"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            port = next(int(m[1]) for line in process.stderr if (m := re.search(r"answers at \S+:(\d+), API", line)))
            for kind, new in (("whole", TOKENS), ("streamed", TOKENS), ("one token", 1)):
                extra = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": kind == "streamed"}
                bodies = [json.dumps({"prompt": prompt, **extra}) for prompt in prompts]
                turns = []
                for _ in range(TURNS):
                    before = cpu_seconds(process)
                    asyncio.run(asked_over_http(port, bodies))
                    turns.append(cpu_seconds(process) - before)
                found[f"{kind}, s"] = round(min(turns), 2)
            process.terminate()
            process.wait(60)
    count = REQUESTS * TOKENS
    request = (found["one token, s"] - found["engine alone, one token, s"]) / REQUESTS
    found["ms a request"] = round(1e3 * request, 2)
    for kind in ("whole", "streamed"):
        rest = found[f"{kind}, s"] - found["engine alone, s"] - request * REQUESTS
        found[f"us a token, {kind}"] = round(1e6 * rest / count, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moe-mamba-small", help="a preset")
    parser.add_argument("--weights", default="float32", choices=["float32", "int8"])
    parser.add_argument("--rate", type=float, nargs="+", default=[8.0, 12.0], help="requests a second")
    parser.add_argument("--only", nargs="+", default=["poisson", "long", "again", "many", "http"])
    parser.add_argument("--peers", action="store_true", help="transformers and llama.cpp too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.model, options.weights)
    results: dict[str, Any] = {"model": options.model, "weights": options.weights, "torch": torch.__version__}
    kinds = {
        "poisson": lambda: {f"{rate:g} a second": poisson(model, rate) for rate in options.rate},
        "long": lambda: long_prompt(model),
        "again": lambda: same_again(model),
        "many": lambda: many_long(model),
        "http": over_http,
        "peers": lambda: compared(build(options.model), [(p, n) for _, p, n in arrivals(1.0)[:32]], SLOTS, served),
    }
    for kind in dict.fromkeys([*options.only, *(["peers"] if options.peers else [])]):
        results[kind] = kinds[kind]()
        print(f"{kind}: {json.dumps(results[kind], indent=2)}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
