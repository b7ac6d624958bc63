"""Decoding far into a sequence, of the four models of one active size: `inference.py --contexts 1024 8192 131072`.

Each row holds so many tokens already. For a Mamba layer that is its state; an attention layer gets keys and values of a
short prompt, repeated: speed and memory depend on their number and not on their values. Measured: milliseconds of a
step of all rows (median of turns), tokens a second, bytes of state of a sequence, seconds to read so many tokens as one
prompt, by pieces. Computed from memory and state: how many sequences fit; on a GPU so many are put and stepped, fewer
where that fails. `--tiny` takes the presets for a laptop, float32 on a CPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from moemamba import MoEMamba, State, preset
from moemamba.checkpoint import device_memory
from moemamba.counting import state_bytes
from moemamba.inference.graph import Stepper, capturable
from moemamba.inference.slots import Slots
from moemamba.layers import LAYERS
from moemamba.longcontext.pieces import hidden_by_pieces

PRESETS = ("mamba", "moe-mamba", "transformer", "transformer-moe")
PROMPT, PIECE = 64, 2048
WARM_UP, STEPS, TURNS = 4, 16, 5
SHARES = (1.0, 0.95, 0.9, 0.8, 0.65, 0.5)  # of the computed number of sequences that are tried


def build(name: str, tiny: bool, device: torch.device) -> MoEMamba:
    """A model of random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    config = preset(f"{name}-{'tiny' if tiny else '25m'}", norm="rmsnorm", final_norm=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return MoEMamba(config).to(device, dtype).eval().requires_grad_(False)


def state_at(model: MoEMamba, rows: int, context: int) -> State:
    """The state of rows that hold `context` tokens each."""
    prompt = torch.zeros(rows, min(PROMPT, context), dtype=torch.int64, device=model.embedding.weight.device)
    state: State = model.backbone(prompt)[1]
    return State(tuple(lengthened(mixer, context) for mixer in state.mixers))


def lengthened(mixer: Any, context: int) -> Any:
    """Keys and values for so many tokens; what does not grow with them as it is."""
    if not hasattr(mixer, "keys"):
        return mixer
    times = -(-context // mixer.positions.shape[1])
    keys, values = (each.repeat(1, 1, times, 1)[:, :, :context].contiguous() for each in (mixer.keys, mixer.values))
    places = torch.arange(context, device=keys.device).expand(len(keys), -1).contiguous()
    return mixer._replace(keys=keys, values=values, positions=places)


def seated(model: MoEMamba, rows: int, context: int, left: int, at_once: int = 64) -> Stepper:
    """Rows in slots, ready to be stepped `left` times."""
    kinds = [LAYERS[letter] for layer in model.config.layers for letter in layer if LAYERS[letter].state_type]
    device = model.embedding.weight.device
    slots = Slots(kinds, rows, device)
    slots.reserve(context + left)
    state = state_at(model, min(rows, at_once), context)
    while slots.live < rows:
        some = min(at_once, rows - slots.live)
        slots.put(state.select(slice(0, some)), torch.zeros(some, dtype=torch.int64, device=device))
    captures = capturable(model)
    return Stepper(slots, captures, padded=captures)


def waiting(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def decode(model: MoEMamba, rows: int, context: int, turns: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step and tokens a second, with the spread of the turns."""
    every = WARM_UP + turns * steps
    stepper = seated(model, rows, context, every)
    wait, left, times = waiting(model.embedding.weight.device), every, []
    for turn in range(turns + 1):
        wait()
        begun = time.perf_counter()
        for _ in range(steps if turn else WARM_UP):
            stepper.step(model, True, left + 8)  # worth a graph up to the last
            left -= 1
        wait()
        times.append((time.perf_counter() - begun) / steps)
    seconds = statistics.median(times[1:])
    spread = max(times[1:]) / min(times[1:])
    return {"ms_per_step": 1e3 * seconds, "tokens_per_second": rows / seconds, "slowest_over_fastest": spread}


def read(model: MoEMamba, context: int) -> float:
    """Seconds to read one prompt of `context` tokens, by pieces."""
    device = model.embedding.weight.device
    tokens = torch.zeros(1, context, dtype=torch.int64, device=device)
    wait = waiting(device)
    for length in (min(context, PIECE), context):  # kernels are compiled at the first
        wait()
        begun = time.perf_counter()
        for _ in hidden_by_pieces(model, tokens[:, :length], PIECE, torch.float32):
            pass
        wait()
        seconds = time.perf_counter() - begun
    return seconds


def fits(model: MoEMamba, context: int, memory: int) -> int:
    """Sequences of `context` tokens whose state fits beside the weights."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    each = state_bytes(model.config, context, model.embedding.weight.element_size())
    return max(0, int((memory - weights) // each))


def tried(model: MoEMamba, context: int, most: int) -> int:
    """The largest share of so many sequences that can be put and stepped on this GPU."""
    for share in SHARES:
        rows = int(most * share)
        try:
            if rows:
                seated(model, rows, context, 1).step(model, True, 1)
                torch.cuda.synchronize()
            return rows
        except torch.cuda.OutOfMemoryError:
            pass
        finally:
            torch.cuda.empty_cache()
    return 0


def measure(model: MoEMamba, name: str, context: int, batches: list[int], quick: bool, most: int) -> dict[str, Any]:
    """One model at one context."""
    device = model.embedding.weight.device
    memory = device_memory(device) or 0
    row: dict[str, Any] = {
        "model": name,
        "context": context,
        "state_bytes": state_at(model, 1, context).nbytes,
        "fits": fits(model, context, memory),
        "memory": memory,
    }
    if device.type == "cuda":
        row["tried"] = tried(model, context, min(most, row["fits"]))
    try:
        row["seconds_to_read"] = read(model, context)
    except torch.cuda.OutOfMemoryError:
        row["seconds_to_read"] = None
    for batch in batches:
        try:
            row[f"batch {batch}"] = decode(model, batch, context, 2 if quick else TURNS, 2 if quick else STEPS)
        except torch.cuda.OutOfMemoryError:
            row[f"batch {batch}"] = None  # does not fit
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


@torch.inference_mode()
def contexts(lengths: list[int], batches: list[int], tiny: bool, quick: bool, most: int) -> dict[str, Any]:
    """All four models at all contexts, a row each, printed as they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in PRESETS:
        model = build(name, tiny, device)
        error = logits_differ(model, 300)
        print(f"{name}: a step from slots is {error:.1e} from the same token in one call", flush=True)
        if device.type == "cpu" and error > 1e-3:
            sys.exit("refusing to time what is not the same")
        for length in lengths:
            rows.append(measure(model, name, length, batches, quick, most))
            print(rows[-1], flush=True)
        del model
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": where, "dtype": "bfloat16" if device.type == "cuda" else "float32", "rows": rows}


def ratios(found: dict[str, Any], batch: int) -> list[dict[str, float]]:
    """At each context: tokens a second, state and sequences of MoE-Mamba beside those of the dense Transformer."""
    by = {(row["model"], row["context"]): row for row in found["rows"]}
    table = []
    for context in sorted({row["context"] for row in found["rows"]}):
        ours, theirs = by["moe-mamba", context], by["transformer", context]
        one: dict[str, float] = {"context": context, "state": theirs["state_bytes"] / ours["state_bytes"]}
        a, b = ours.get(f"batch {batch}"), theirs.get(f"batch {batch}")
        if a and b:
            one[f"tokens/s, batch {batch}"] = a["tokens_per_second"] / b["tokens_per_second"]
        counted = "tried" if "tried" in theirs else "fits"
        if theirs[counted]:
            one["sequences"] = ours[counted] / theirs[counted]
        table.append({key: round(value, 2) for key, value in one.items()})
    return table


def logits_differ(model: MoEMamba, context: int) -> float:
    """Relative error of a step from slots against the same token after its prompt in one call."""
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (2, context + 1), device=model.embedding.weight.device)
    state = model.backbone(tokens[:, :-1])[1]
    stepper = seated(model, 2, 1, 1)
    stepper.slots.live = 0
    stepper.slots.put(state, tokens[:, -1])
    _, logits = stepper.step(model, False, 1)
    assert logits is not None
    expected = model(tokens).logits[:, -1].float()
    return float((logits.float() - expected).norm() / expected.norm())
