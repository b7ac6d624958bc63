"""A whole training step on a GPU, beside mamba-ssm's and transformers': `training.py [--profile] [--only moe]`.

Forward, loss, backward, clipping and fused AdamW at 256 x 256 tokens and a vocabulary of 50,257, in one run:

- our `mamba-25m` and `moe-mamba-25m` with 32 experts, bfloat16 over float32 weights, layers compiled, in the very step
  that `moemamba train` takes: batches from the host, replayed as a CUDA graph, and without one;
- mamba-ssm's block (16 layers, d_model 512) as its models use it: convolution, projections and scan as one fused
  function, the residual addition fused with the norm; the same precision;
- transformers' Jamba without attention: 8 x (Mamba + 32 experts of the same active size), with mamba-ssm's kernels, its
  experts as grouped products and, with `--eager`, as its plain loop too (fewer steps, since it takes so long); weights
  and optimiser in bfloat16, which is less work than ours.

Before anything is timed, our Mamba must have the loss and gradients of mamba-ssm's block with the same weights, and our
mixture of experts those of Jamba's block with the same weights. Jamba's Mamba layer has norms that ours lacks, so that
whole models cannot be compared; its two kinds of experts are, with each other.

Tokens per second as a run makes them: groups of STEPS steps, submitted one after another between two CUDA events, after
which the losses are read as a run reads them for its log; so the host's time counts where the GPU waits for it. The
median group, and the most memory in GiB. `--profile` prints the kernels that one step spends most time in. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moemamba import MoEMamba, TrainConfig, preset
from moemamba.data.batches import Batch
from moemamba.distributed import Processes
from moemamba.layers import MoE
from moemamba.training.update import optimizer_of
from moemamba.training.update.guard import Guard, Skips
from moemamba.training.update.step import WARM_UP, Step

BATCH, LENGTH, VOCABULARY = 256, 256, 50_257
STEPS, GROUPS = 10, 5  # steps between two readings of the loss, as TrainConfig.log_every has it, and such groups
RATE = 5e-4
D, N_LAYERS, N_EXPERTS = 512, 16, 32
KERNELS = 40  # that a profile lists
CLOSE = 2e-3  # relative error of the loss, bfloat16
GRADIENT = 3e-2  # and of each parameter's gradient

Loss = Callable[[Tensor, Tensor], Tensor]


class Stepping(NamedTuple):
    """A training step, and what a run does after some of them: it waits for the losses."""

    step: Callable[[], None]
    read: Callable[[], object]


class Contender(NamedTuple):
    """A model, and its loss of tokens (b, l) and the tokens that follow."""

    model: nn.Module
    loss: Loss
    autocast: bool = True
    graph: Literal["on", "off"] | None = None
    """`cuda_graph` of the run that the step is one of; None for others' models"""
    steps: int = STEPS
    """in a group"""


def ours(name: str, graph: Literal["on", "off"], **changes: Any) -> Contender:
    """A preset, its layers compiled."""
    config = preset(name).replace(**changes)
    model = MoEMamba(config).cuda()
    model.compile_layers(fullgraph=True)
    return Contender(model, our_loss(model), graph=graph)


def our_loss(model: MoEMamba) -> Loss:
    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        output = model(tokens, targets=targets)
        return output.loss + output.auxiliary

    return loss


def mamba_ssm() -> Contender:
    """Mamba as mamba-ssm builds it, on the parameters of one of our models."""
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    config = preset("mamba-25m").replace(pattern="M", n_blocks=N_LAYERS, d_model=D, norm="rmsnorm", final_norm=True)
    mamba = MoEMamba(config).cuda()

    def add_norm(hidden: Tensor, residual: Tensor | None, norm: Any, prenorm: bool) -> Any:
        return rms_norm_fn(
            hidden, norm.weight, None, residual=residual, eps=norm.eps, prenorm=prenorm, residual_in_fp32=True
        )

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, residual = mamba.embedding(tokens), None
        for layer in mamba.layers:
            mixer: Any = layer.branches[0]
            hidden, residual = add_norm(hidden, residual, layer.norm, True)
            hidden = mamba_inner_fn(
                (mixer.in_proj.weight @ hidden.flatten(0, 1).T).view(-1, *hidden.shape[:2]).transpose(0, 1),
                mixer.conv1d.weight,
                mixer.conv1d.bias,
                mixer.x_proj.weight,
                mixer.dt_proj.weight,
                mixer.out_proj.weight,
                None,
                -torch.exp(mixer.A_log),
                None,
                None,
                mixer.D,
                delta_bias=mixer.dt_proj.bias,
                delta_softplus=True,
            )
        logits = F.linear(add_norm(hidden, residual, mamba.norm, False), mamba.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Contender(mamba, loss)


def jamba(experts: str, **changes: Any) -> Contender:
    """Jamba without attention; experts "grouped_mm" or "eager", both transformers' own."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from transformers import JambaConfig, JambaForCausalLM
    from transformers.models.jamba import modeling_jamba

    # transformers looks for these itself, but takes a loop in Python where the package as a whole cannot be imported.
    modeling_jamba.causal_conv1d_fn = lambda *given, activation, **_: causal_conv1d_fn(*given, activation=activation)
    modeling_jamba.mamba_selective_scan = lambda *given, use_mambapy, use_associative_scan, **more: selective_scan_fn(
        *given, **more
    )
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": 2 * D,  # three matrices: as many weights as 512 x 1536 twice
        "num_hidden_layers": N_LAYERS // 2,
        "num_experts": N_EXPERTS,
        "num_experts_per_tok": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": N_LAYERS + 1,  # a period that no layer reaches
        "attn_layer_offset": N_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "use_cache": False,
    }
    config = JambaConfig(**shape | changes)
    torch.manual_seed(0)
    model = JambaForCausalLM._from_config(config, dtype=torch.bfloat16, experts_implementation=experts).cuda()
    assert set(config.layers_block_type) == {"mamba"}

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits
        found: Tensor = model.loss_function(logits, None, VOCABULARY, shift_labels=targets.contiguous())
        return found

    return Contender(model, loss, autocast=False, steps=STEPS if experts == "grouped_mm" else 3)


def check_mamba() -> dict[str, float]:
    """Our Mamba's loss and gradients against mamba-ssm's block, on the same parameters."""
    theirs = mamba_ssm()
    assert isinstance(theirs.model, MoEMamba)
    parameters = dict(theirs.model.named_parameters())
    tokens = torch.randint(0, VOCABULARY, (8, LENGTH + 1), device="cuda")
    results = []
    for loss in (our_loss(theirs.model), theirs.loss):
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(tokens[:, :-1], tokens[:, 1:])
        results.append((value, torch.autograd.grad(value, list(parameters.values()))))
    (value, gradients), (their_value, their_gradients) = results
    errors = {"loss": abs(value.item() / their_value.item() - 1)}
    errors |= {name: error(*pair) for name, *pair in zip(parameters, gradients, their_gradients, strict=True)}
    return judge("our Mamba against mamba-ssm's block", errors)


def check_experts() -> dict[str, float]:
    """Our mixture of experts against Jamba's block in float32, and Jamba's grouped products against its loop."""
    theirs: Any = jamba("eager", num_hidden_layers=1).model.model.layers[0].feed_forward.float()
    layer = MoE(D, N_EXPERTS, 2 * D, activation="swiglu").cuda()
    weights = [theirs.router.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj]
    parameters = [layer.router.weight, layer.experts.up_proj, layer.experts.down_proj]
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight.mul_(4))  # choices that rounding does not change
    x = torch.randn(8, LENGTH, D, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    y, their_y = layer(x)[0], theirs(x)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    their_gradients = torch.autograd.grad(their_y, [x, *weights], dy)
    names = ("y", "x", "router", "up", "down")
    pairs = zip(names, (y, *gradients), (their_y, *their_gradients), strict=True)
    errors = {name: error(*pair) for name, *pair in pairs}
    tokens = torch.randint(0, VOCABULARY, (8, LENGTH + 1), device="cuda")
    with torch.no_grad():
        found = [jamba(kind).loss(tokens[:, :-1], tokens[:, 1:]).item() for kind in ("eager", "grouped_mm")]
    errors["loss"] = abs(found[1] / found[0] - 1)
    return judge("our experts against Jamba's block", errors)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().float(), expected.detach().float()
    return float((got - expected).norm() / expected.norm())


def judge(what: str, errors: dict[str, float]) -> dict[str, float]:
    """Stop here if the two sides are not the same function; returns the loss's error and the worst gradient's."""
    worst = max((name for name in errors if name != "loss"), key=errors.__getitem__)
    print(f"{what}: the loss is off by {errors['loss']:.1e}, {worst} by {errors[worst]:.1e}", flush=True)
    if not (errors["loss"] < CLOSE and errors[worst] < GRADIENT):
        sys.exit("refusing to time what is not the same")
    return {"loss": errors["loss"], worst: errors[worst]}


def our_step(contender: Contender, batch: int) -> Stepping:
    """The step of `moemamba train`."""
    model, device = contender.model.train(), torch.device("cuda", torch.cuda.current_device())
    assert isinstance(model, MoEMamba) and contender.graph is not None
    config = TrainConfig(model.config, cuda_graph=contender.graph, learning_rate=RATE)
    guard = Guard(config, device, Skips())
    take = Step(model, optimizer_of(model, config), config, torch.bfloat16, guard, Processes(device))
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1))
    part = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)

    def step() -> None:
        take(1, [part], config.learning_rate)

    return Stepping(step, guard.read)


def their_step(contender: Contender, batch: int) -> Stepping:
    """The same for models that are not ours."""
    model = contender.model.train()
    optimizer = optimizer_of(model, TrainConfig(learning_rate=RATE))
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1), device="cuda")
    found: list[Tensor] = []

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=contender.autocast):
            value = contender.loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.detach())

    def read() -> None:
        torch.stack(found).tolist()
        found.clear()

    return Stepping(step, read)


def measure(contender: Contender, profile: bool, batch: int) -> dict[str, float]:
    """Tokens per second and peak GiB of a training step."""
    torch.cuda.reset_peak_memory_stats()  # before the capture, whose memory a replay does not ask for again
    step, read = our_step(contender, batch) if contender.graph else their_step(contender, batch)
    for _ in range(WARM_UP + 2):
        step()
    read()
    times = []
    for _ in range(GROUPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(contender.steps):
            step()
        end.record()
        read()
        end.synchronize()
        times.append(start.elapsed_time(end) / contender.steps)
    peak = torch.cuda.max_memory_allocated()
    milliseconds = statistics.median(times)
    if profile:
        print_kernels(step, milliseconds)
    return {
        "tokens_per_second": round(batch * LENGTH / milliseconds * 1e3),
        "peak_gib": round(peak / 2**30, 1),
        "tokens": batch * LENGTH,
    }


def print_kernels(step: Callable[[], None], milliseconds: float) -> None:
    """Milliseconds, calls and name of each kernel of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    print(f"{busy:8.2f} ms of kernels in a step of {milliseconds:.2f}; {sum(e.count for e in kernels)} of them")
    for event in kernels[:KERNELS]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:4d} x {event.key[:90]}")


def measure_largest(make: Callable[[], Contender], profile: bool, batches: Iterable[int]) -> dict[str, Any] | str:
    """`measure` with the first of the batches that fits into memory."""
    for batch in batches:
        try:
            return measure(make(), profile, batch)
        except ImportError as error:
            return f"skipped: {error}"
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return "does not fit into memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--eager", action="store_true", help="time Jamba with its plain loop over experts too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "this benchmark needs a GPU"}))
        return
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    cases: dict[str, Callable[[], Contender]] = {
        "moe-mamba-25m, 32 experts": lambda: ours("moe-mamba-25m", "on", n_experts=N_EXPERTS),
        "moe-mamba-25m, no graph": lambda: ours("moe-mamba-25m", "off", n_experts=N_EXPERTS),
        "mamba-25m": lambda: ours("mamba-25m", "on"),
        "mamba-25m, no graph": lambda: ours("mamba-25m", "off"),
        "mamba-ssm, M x 16": mamba_ssm,
        "transformers Jamba, grouped_mm": lambda: jamba("grouped_mm"),
    }
    if options.eager:
        cases["transformers Jamba, eager"] = lambda: jamba("eager")
    checks: dict[str, Callable[[], dict[str, float]]] = {"mamba-ssm": check_mamba, "transformers": check_experts}
    for name, check in checks.items():
        if any(case.startswith(options.only) and case.startswith(name) for case in cases):
            try:
                results[f"errors against {name}"] = check()
            except ImportError as error:
                print(f"not compared with {name}: {error}")
        torch.cuda.empty_cache()
    for name, case in cases.items():
        if name.startswith(options.only):
            results[name] = measure_largest(case, options.profile, (BATCH, BATCH // 2, BATCH // 4))
            torch.cuda.empty_cache()
            print(f"{name:30s} {results[name]}", flush=True)
    print(json.dumps(results | ratios(results)))


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of ours over theirs, and of the mixture over the dense model."""
    speed = {name: row["tokens_per_second"] for name, row in results.items() if "tokens_per_second" in row}
    pairs = {
        "moe-mamba-25m / Jamba, grouped_mm": ("moe-mamba-25m, 32 experts", "transformers Jamba, grouped_mm"),
        "moe-mamba-25m / Jamba, eager": ("moe-mamba-25m, 32 experts", "transformers Jamba, eager"),
        "mamba-25m / mamba-ssm": ("mamba-25m", "mamba-ssm, M x 16"),
    }
    return {name: round(speed[a] / speed[b], 2) for name, (a, b) in pairs.items() if a in speed and b in speed}


if __name__ == "__main__":
    main()
