"""Compile what the Triton backend launches for a GPU that need not be there: `python tests/tools/compile_triton.py 90`.

The interpreter accepts programs that the compiler refuses. So here the ops run on CPU tensors while every launch is
turned into a compilation for the compute capability given; their results mean nothing. Prints the shared memory that
each kernel takes, as JSON.
"""

import json
import sys

import torch
from doors import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moemamba.ops.attention import triton_step as attention_step
from moemamba.ops.dense import triton_step as dense_step
from moemamba.ops.experts import triton_products as triton_experts_products
from moemamba.ops.head import triton as triton_cross_entropy
from moemamba.ops.mamba_step import triton as step
from moemamba.ops.mamba_step import triton_many
from moemamba.ops.moe_step import triton as moe_step


class Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


shared = {}


def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    key = f"{self.fn.__module__}.{self.fn.__name__}"
    shared[key] = max(shared.get(key, 0), kernel.metadata.shared)
    return kernel


launch, JITFunction.run = JITFunction.run, compile_only
capability = int(sys.argv[1])
driver.set_active(Absent(capability))


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def differentiate(y):
    y.float().sum().backward()


for name, tiles in triton_experts_products.TILES.items():
    if name in (("ampere",) if capability >= 90 else ("hopper", "narrow")):
        continue
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    triton_experts_products.choose_tiles = lambda *_, tiles=tiles: tiles
    x, indices = draw(48, 32, dtype=dtype), torch.randint(0, 5, (48, 2))
    cases = [("relu", True), ("relu", False), ("gelu", True), ("swiglu", True)]
    for activation, gates in cases if name in ("hopper", "narrow", "ampere") else cases[-1:]:
        up, down = draw(4, 128 if activation == "swiglu" else 64, 32, dtype=dtype), draw(4, 32, 64, dtype=dtype)
        weights = draw(48, 2, dtype=torch.float32) if gates else None
        differentiate(triton.expert_feedforward(x, indices, weights, up, down, activation))
        differentiate(triton.expert_linear(x, indices, weights, up))
    differentiate(triton.grouped_linear(x, up, torch.tensor([9, 0, 30, 5])))
triton.places_in_queues(torch.randint(0, 5, (300,)), 5)
for length in (1, 300):
    u, A, B = draw(2, length, 96), -torch.rand(96, 16).requires_grad_(), draw(2, length, 16)
    vector, initial, window = (draw(*shape, dtype=torch.float32) for shape in ((96,), (2, 96, 16), (2, 96, 3)))
    sequences = torch.zeros(2, length, dtype=torch.int32)
    differentiate(triton.selective_scan(u, u, A, B, B, vector, u, vector, True, initial, sequences)[0])
    differentiate(triton.selective_scan(u, u, A, B, B, None, None, None, False, None, None)[0])
    weight = draw(96, 4, dtype=torch.float32)
    differentiate(triton.causal_conv1d(u, weight, vector, "silu", window, sequences)[0])
    differentiate(triton.causal_conv1d(u, weight, None, None, None, None)[0])
triton_cross_entropy.choose_tiles = lambda x: (
    "float32" if x.dtype == torch.float32 else "hopper" if capability >= 90 else "ampere"
)
for dtype in (torch.bfloat16, torch.float32):
    for d, triton_cross_entropy.MANY_WORDS in ((128, 0), (40, 0), (40, 1000)):
        hidden, targets = draw(48, d, dtype=dtype), torch.randint(0, 99, (48,))
        differentiate(triton.linear_cross_entropy(hidden, draw(99, d), targets, -100, "mean"))
        with torch.no_grad():
            triton.linear_cross_entropy(hidden, draw(99, d), targets, -100, "mean")
for dtype in (torch.bfloat16, torch.float32):
    differentiate(triton.linear_beside(draw(2, 70, 96, dtype=dtype), draw(40, 96, dtype=dtype))[1])
differentiate(triton.router_logits(draw(48, 32), draw(4, 32, dtype=torch.float32)))
for n_experts, top_k in ((5, 2), (32, 1), (128, 4)):
    valid, bias = torch.ones(48), torch.zeros(n_experts)
    _, gates, _, probabilities, z, _ = triton.router(
        draw(48, 32), draw(n_experts, 32, dtype=torch.float32), bias, top_k, valid, 2
    )
    differentiate(torch.cat([gates.flatten(), probabilities.flatten(), z]))
with torch.no_grad():
    for dtype in (torch.bfloat16, torch.float32):
        for batch in (1, 9, 16, 40, 256):
            step.overlap = triton_many.overlap = lambda _: capability >= 90
            x, conv, ssm = (
                draw(batch, 1, 512, dtype=dtype),
                draw(batch, 1024, 3, dtype=dtype),
                torch.zeros(batch, 1024, 16),
            )
            shapes = (
                (2048, 512),
                (1024, 4),
                (1024,),
                (64, 1024),
                (1024, 32),
                (1024,),
                (1024, 16),
                (1024,),
                (512, 1024),
            )
            weights = [draw(*shape, dtype=dtype) for shape in (*shapes, (512,), (512,))]
            for norm in ((), weights[9:10], weights[9:]):
                triton.mamba_step(x, conv, ssm, *weights[:9], None, *norm)
            triton.linear_argmax(x[:, 0], draw(50257, 512, dtype=dtype))
for n_experts, top_k in ((32, 1), (128, 4)):
    with torch.no_grad():
        triton.router_choices(draw(9, 512), draw(n_experts, 512), draw(n_experts, dtype=torch.float32), top_k)
for activation in ("relu", "gelu", "silu", "swiglu"):
    up, down = draw(4, 128 if activation == "swiglu" else 64, 32), draw(4, 32, 64)
    for choices in (1, 2):
        with torch.no_grad():
            triton.expert_feedforward(draw(3, 32), torch.randint(0, 4, (3, choices)), None, up, down, activation)
moe_step.overlap = attention_step.overlap = dense_step.overlap = step.overlap
attention_step.multiprocessors = lambda _: 132
with torch.no_grad():
    for dtype in (torch.bfloat16, torch.float32):
        scale = draw(512, dtype=dtype)
        sizes = (("relu", 42, 1, 1536), ("swiglu", 128, 4, 256), ("geglu", 8, 2, 341))
        for activation, n_experts, top_k, f in sizes:
            up, down = draw(n_experts, (1 + (top_k > 1)) * f, 512, dtype=dtype), draw(n_experts, 512, f, dtype=dtype)
            for batch in (1, 3, 64, 1024):
                x, router, bias = draw(batch, 1, 512, dtype=dtype), draw(n_experts, 512, dtype=dtype), draw(n_experts)
                normed = (None, "softmax", None, None, scale, scale)
                triton.moe_step(x, router, bias, up, down, top_k, activation, *normed)
        for batch in (1, 9):
            x = draw(batch, 512, dtype=dtype)
            triton.norm_linear(x, draw(2048, 512, dtype=dtype), draw(2048), scale, None, 1e-5, "relu")
            triton.norm_linear(x, draw(2720, 512, dtype=dtype), None, scale, scale, 1e-5, "swiglu")
            triton.linear_add(draw(batch, 2048, dtype=dtype), draw(512, 2048, dtype=dtype), draw(512), x)
            for groups, room in ((8, 256), (8, 4096), (2, 4096)):
                cache = torch.zeros(batch, groups, room, 64, dtype=dtype)
                positions, place = torch.zeros(batch, room, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
                qkv, base = draw(batch, 512 + 128 * groups, dtype=dtype), 1e4 if room > 256 else None
                triton.attention_step(qkv, cache, cache.clone(), positions, place, base)
    biased = (draw(42), "sigmoid", draw(42, 64), draw(42, 512), scale.bfloat16())
    for batch in (2, 64):
        up, down = draw(42, 64, 512), draw(42, 512, 64)
        triton.moe_step(draw(batch, 1, 512), draw(42, 512), draw(42), up, down, 1, "relu2", *biased)
print(json.dumps(shared))
