"""Experts and vocabulary head on a GPU, against their floors and what PyTorch offers: `python benchmarks/experts.py`.

Every op is first compared with the float32 reference, output and gradients; one that fails is not timed. Times are
medians of CUDA events, forward and backward, in milliseconds. The last line is one JSON object. scattermoe
(https://github.com/shawntan/scattermoe, Triton alone) is measured where it can be imported.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from time import perf_counter as clock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moemamba import ops
from moemamba.layers import MoE

TOKENS, D, D_EXPERT, N_EXPERTS, VOCABULARY = 65_536, 512, 1536, 32, 50_257
TOLERANCE = 1e-2  # bfloat16 operands, float32 accumulators

Function = Callable[..., Any]  # a tensor, or several


def measure(function: Callable[[], object], repeats: int = 15) -> float:
    """Median milliseconds on the device; the queue is filled first, so that launching is not what is timed."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    begin = clock()
    function()
    launch = clock() - begin
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(int(2e9 * (0.01 + 2 * repeats * launch)))  # cycles, of which there are less than 2e9 a second
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def time(function: Function, inputs: dict[str, Tensor], parameters: Iterable[Tensor] = ()) -> dict[str, float]:
    """Milliseconds forward and backward, and the most memory beyond the inputs in GiB."""

    def call() -> tuple[Tensor, ...]:
        y = function(**inputs)
        return y if isinstance(y, tuple) else (y,)

    y = call()
    dy, wanted = [torch.randn_like(t) for t in y], [*inputs.values(), *parameters]
    forward = measure(call)
    backward = measure(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))
    y = ()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call(), wanted, dy)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"forward": round(forward, 3), "backward": round(backward, 3), "peak_gib": round(peak, 2)}


def check(function: Function, oracle: Function, inputs: dict[str, Tensor]) -> None:
    """Stop here unless the output and each gradient are the oracle's, computed in float32."""
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    results = []
    for f, given in ((function, inputs), (oracle, exact)):
        y = f(**given)
        dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
        results.append((y, *torch.autograd.grad(y, list(given.values()), dy.to(y.dtype))))
    for name, got, expected in zip(("y", *inputs), *results, strict=True):
        error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error <= TOLERANCE:
            sys.exit(f"refusing to time: {name} is off by {error:.1e}")


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16().requires_grad_()


def grouped_mm(x: Tensor, indices: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same layer (top-1, ReLU) from PyTorch's own parts."""
    order = indices.flatten().argsort(stable=True)
    ends = torch.bincount(indices.flatten(), minlength=up.shape[0]).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order], up.transpose(1, 2), offs=ends).relu()
    y = F.grouped_mm(h, down.transpose(1, 2), offs=ends) * gates[order].to(x.dtype)
    return torch.empty_like(y).index_copy(0, order, y)


def scattermoe(x: Tensor, indices: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> object:
    """The same layer from scattermoe, or why there is no time."""
    try:
        from scattermoe.mlp import MLP
    except ImportError as error:
        return f"skipped: {error}"
    layer = MLP(D, D_EXPERT, N_EXPERTS, 1, activation=F.relu).cuda().bfloat16()
    with torch.no_grad():
        layer.experts.weight.copy_(up)
        layer.output_experts.weight.copy_(down)

    def routed(x: Tensor) -> Tensor:
        y: Tensor = layer(x, gates.detach().to(x.dtype), indices)
        return y

    expected = ops.expert_feedforward(x, indices, gates, up, down)
    error = ((routed(x) - expected).float().norm() / expected.float().norm()).item()
    if not error <= TOLERANCE:
        return f"not timed: its output is off by {error:.1e}"
    try:
        return time(routed, {"x": x}, layer.parameters())
    except Exception as error:  # of its kernels on this version of Triton
        return {"forward": round(measure(lambda: routed(x)), 3), "backward": f"fails: {str(error).splitlines()[0]:.80}"}


def experts() -> dict[str, object]:
    """A routed feed-forward layer against a dense one of the same active size."""
    x = draw(TOKENS, D)
    up, down = draw(N_EXPERTS, D_EXPERT, D, scale=D**-0.5), draw(N_EXPERTS, D, D_EXPERT, scale=D_EXPERT**-0.5)
    gates, indices = torch.randn(TOKENS, N_EXPERTS, device="cuda").softmax(-1).max(-1, keepdim=True)
    inputs = {"x": x, "gates": gates.requires_grad_(), "up": up, "down": down}

    def op(x: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.expert_feedforward(x, indices, gates, up, down)

    def reference(**given: Tensor) -> Tensor:
        with ops.backend("reference"):
            return op(**given)

    check(op, reference, inputs)
    layer = MoE(D, N_EXPERTS, D_EXPERT, activation="relu").cuda().bfloat16()

    def routed(x: Tensor) -> Tensor:
        y: Tensor = layer(x[None])[0]
        return y

    def dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.linear(x, up).relu(), down)

    one = {"x": x, "up": draw(D_EXPERT, D), "down": draw(D, D_EXPERT)}
    dense_cases = {
        "dense feed-forward": time(dense, one),
        "dense feed-forward, compiled": time(torch.compile(dense), one),
    }
    return dense_cases | {
        "scattermoe": scattermoe(x, indices, gates, up, down),
        "sort + gather + grouped_mm + scatter": time(lambda **t: grouped_mm(indices=indices, **t), inputs),
        "expert_feedforward": time(op, inputs),
        "expert_feedforward, float32 weights": time(op, inputs | {n: inputs[n].float() for n in ("up", "down")}),
        "MoE layer": time(routed, {"x": x}, layer.parameters()),
        "MoE layer, compiled": time(torch.compile(routed, fullgraph=True), {"x": x}, layer.parameters()),
    }


def training() -> dict[str, object]:
    """Layers as models train them: float32 weights under autocast, with the balance loss, compiled."""
    cases = {
        "paper's: 32 experts, capacity 1": (MoE(D, N_EXPERTS, D_EXPERT, activation="relu", capacity_factor=1), 256),
        "fine: d_model 128, 128 experts of 64, top-4": (MoE(128, 128, 64, top_k=4), 128),
    }
    results: dict[str, object] = {}
    torch._functorch.config.donated_buffer = False  # what the backward pass reads is read again in the next
    for name, (layer, batch) in cases.items():
        layer = layer.cuda()

        def routed(x: Tensor, layer: MoE = layer) -> tuple[Tensor, Tensor]:
            with torch.autocast("cuda", torch.bfloat16):
                y, stats = layer(x)
            return y, stats.balance_loss

        x = draw(batch, 256, layer.router.weight.shape[1])
        results[name] = time(torch.compile(routed, fullgraph=True), {"x": x}, layer.parameters())
    return results


def head(tokens: int = TOKENS, d: int = D) -> dict[str, object]:
    """The vocabulary head's loss."""
    hidden, weight = draw(tokens, d), draw(VOCABULARY, d, scale=d**-0.5)
    targets = torch.randint(0, VOCABULARY, (tokens,), device="cuda")

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, targets)

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        with ops.backend("reference"):
            return op(hidden, weight)

    check(op, reference, {"hidden": hidden, "weight": weight})
    inputs = {"hidden": hidden, "weight": weight}
    return {
        "logits + cross_entropy": time(whole, inputs),
        "logits + cross_entropy, compiled": time(torch.compile(whole), inputs),
        "in chunks, recomputed": time(reference, inputs),
        "linear_cross_entropy": time(op, inputs),
    }


def narrow_head() -> dict[str, object]:
    """That of the models that `moemamba paper --scale gpu` trains."""
    return head(32_768, 128)


def main() -> None:
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "this benchmark needs a GPU"}))
        return
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    ceiling = 2 * 8192**3 / measure(lambda: a @ b) / 1e9
    results: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "bf16_tflops": round(ceiling)}
    for case in (experts, training, head, narrow_head):
        results[case.__name__] = table = case()
        for name, row in table.items():
            print(f"{name:45s} {row}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
