"""A whole training step on a GPU, against mamba-ssm's kernels: `benchmarks/training.py [--profile] [--only moe]`.

Forward, loss, backward, clipping and fused AdamW at 256 x 256 tokens and a vocabulary of 50,257, bfloat16 over float32
weights. Tokens per second from the median step (CUDA events), and the most memory in GiB. `--profile` prints the
kernels that one step spends most time in. The last line is one JSON object.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moemamba import MoEMamba, TrainConfig, preset
from moemamba.training.loss import losses
from moemamba.training.optim import make_optimizer

BATCH, LENGTH, REPEATS = 256, 256, 10
KERNELS = 40  # that a profile lists


def ours(name: str, **changes: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A preset, its layers compiled."""
    config = preset(name, **changes)
    model = MoEMamba(config).cuda()
    model.compile_layers(fullgraph=True)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        language, auxiliary = losses(model(tokens, targets=targets), config.routers)
        return language + auxiliary

    return model, loss


def mamba_ssm(n_layers: int = 16, d: int = 512) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Mamba as mamba-ssm builds it: the block as one fused function, residual addition fused with the norm."""
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    mamba = MoEMamba(preset("mamba-25m").replace(pattern="M", n_blocks=n_layers, d_model=d, norm="rmsnorm")).cuda()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, residual = mamba.embedding(tokens), None
        for layer in mamba.layers:
            mixer, norm = layer.branches[0], layer.norm
            hidden, residual = rms_norm_fn(
                hidden, norm.weight, None, residual=residual, eps=norm.eps, prenorm=True, residual_in_fp32=True
            )
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
        logits = F.linear(hidden + residual, mamba.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return mamba, loss


def measure(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], profile: bool) -> dict[str, float]:
    """Tokens per second and peak GiB of a training step."""
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(0, 50_257, (BATCH, LENGTH + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated()
    if profile:
        print_kernels(step)
    return {
        "tokens_per_second": round(BATCH * LENGTH / statistics.median(times) * 1e3),
        "peak_gib": round(peak / 2**30, 1),
    }


def print_kernels(step: Callable[[], None]) -> None:
    """Milliseconds, calls and name of each kernel of a step,."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    print(f"{sum(event.self_device_time_total for event in kernels) / 1e3:8.2f} ms in all")
    for event in kernels[:KERNELS]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:4d} x {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    options = parser.parse_args()
    results: dict[str, object] = {"gpu": torch.cuda.get_device_name()}
    cases: dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]] = {
        "mamba-25m": lambda: ours("mamba-25m"),
        "moe-mamba-25m, 32 experts": lambda: ours("moe-mamba-25m", n_experts=32),
        "mamba-ssm, M x 16": mamba_ssm,
    }
    for name, case in cases.items():
        if not name.startswith(options.only):
            continue
        try:
            model, loss = case()
        except ImportError as error:
            results[name] = f"skipped: {error}"
        else:
            results[name] = measure(model, loss, options.profile)
            del model, loss
            torch.cuda.empty_cache()
        print(f"{name:30s} {results[name]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
