"""The requests of `serving.py` on other programs with the same weights, for its option `--peers`.

transformers' `generate` is asked one after another, since it cannot batch what comes at any time, and once in a static
batch of equal lengths; llama.cpp's server (the package xllamacpp) as many at once as it has slots. All requests are
there from the beginning, so that a second of CPU time is a second of work: nothing waits.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

Asked = Sequence[tuple[list[int], int]]
"""prompts, and how many tokens each wants"""
COMPARED, SHORT, BATCH = 4, 16, (16, 128, 64)  # requests compared, their tokens; rows, prompt and new tokens of a batch


def compared(model: Any, asked: Asked, slots: int, engine: Any) -> dict[str, Any]:
    """All sides in one run: tokens a second of CPU time, and how many greedy tokens are as ours.

    Args:
        engine: makes an engine of a model and a number of slots.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from moemamba import load, save
    from moemamba.inference import Request, Sampling
    from moemamba.integrations.export import export
    from moemamba.integrations.portability import architecture
    from moemamba.text import ByteTokenizer

    def ours(requests: Asked, of: Any = model) -> list[list[int]]:
        running = engine(of, slots)
        found: dict[int, list[int]] = {
            running.submit(Request(prompt, new, Sampling(temperature=0))): [] for prompt, new in requests
        }
        while running.busy:
            for event in running.step():
                found[event.request].append(event.token)
        return list(found.values())

    def theirs(rows: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(rows)
        with torch.inference_mode():
            out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    draw, (rows, length, new) = random.Random(5), BATCH
    batch = [([draw.randrange(256) for _ in range(length)], new) for _ in range(rows)]
    probe = [(prompt, SHORT) for prompt, _ in asked[:COMPARED]]
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/run", model, ByteTokenizer())
        int8 = load(f"{folder}/run", weights="int8")[0].eval()
        export(f"{folder}/run", architecture(model.config), f"{folder}/hf")
        hf: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32).eval()
        hf.generation_config.eos_token_id = None
        export(f"{folder}/run", "gguf", f"{folder}/gguf")
        with Server(Path(folder) / "gguf" / "model.gguf", slots) as llama:
            expected = ours(probe)
            equal = {
                "transformers": [theirs([prompt], new)[0] for prompt, new in probe],
                "llama.cpp": llama.answers(probe),
            }
            return {
                "greedy tokens as ours, of " + str(COMPARED * SHORT): {
                    side: sum(a == b for a, b in zip(chain(*expected), chain(*found), strict=True))
                    for side, found in equal.items()
                },
                "requests": len(asked),
                "tokens a CPU second": {
                    "ours": rate(lambda: ours(asked), asked),
                    "ours, 8 bits": rate(lambda: ours(asked, int8), asked),
                    "llama.cpp": rate(lambda: llama.answers(asked), asked, llama.seconds),
                    "transformers, one after another": rate(lambda: [theirs([each], n) for each, n in asked], asked),
                },
                "the same of {} rows of {} + {}".format(*BATCH): {
                    "ours": rate(lambda: ours(batch), batch),
                    "ours, 8 bits": rate(lambda: ours(batch, int8), batch),
                    "llama.cpp": rate(lambda: llama.answers(batch), batch, llama.seconds),
                    "transformers, a batch": rate(lambda: theirs([each for each, _ in batch], new), batch),
                },
            }


def rate(work: Any, asked: Asked, clock: Any = time.process_time, turns: int = 2) -> int:
    """New tokens a second, the best of some turns."""
    seconds = []
    for _ in range(turns):
        before = clock()
        work()
        seconds.append(clock() - before)
    return round(sum(new for _, new in asked) / min(seconds))


class Server:
    """llama.cpp's server in a process of its own, with one thread and so many slots."""

    def __init__(self, file: Path, slots: int):
        command = [sys.executable, __file__, str(file), str(slots)]
        self._slots = slots
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._address = next(line.split()[1] for line in self._process.stdout if line.startswith("listening "))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def seconds(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def answers(self, asked: Asked) -> list[list[int]]:
        """Tokens of each, greedily, as many at once as there are slots."""
        with ThreadPoolExecutor(self._slots) as clients:
            return list(clients.map(self._answer, asked))

    def _answer(self, asked: tuple[list[int], int]) -> list[int]:
        prompt, new = asked
        body = {"prompt": prompt, "n_predict": new, "temperature": 0.0, "samplers": ["temperature"]}
        body |= {"cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        head = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self._address}/completion", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer)["tokens"])


def serve(file: str, slots: int) -> None:
    """Be such a process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel = slots * 1024, slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup, parameters.verbosity = True, -1
    server = xllamacpp.Server(parameters)
    print("listening", server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
