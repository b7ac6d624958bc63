"""The selective scan on an NVIDIA GPU: how the kernels of `cuda.cu` are launched; a custom op with its gradient.

They hold for up to 16 states a channel and tensors of one dtype; `choice.py` knows who takes every other scan.
"""

import functools
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import dense_rows, gradients_like
from ..kit.cuda import TYPES, Module, plain, processors, source
from ..kit.op import gradient, op
from ..packing import position_marks

STATES, STEPS = 16, 8
WALKERS = 128  # threads of a block that walks along time, two channels each
CHUNK, TILE = 32, 64  # of the backward pass: positions between saved states, and channels of a block
THREADS = 2 * TILE
WALKS, TURNS = 4, 3  # blocks of a multiprocessor at a time, of a kernel that walks and of the backward one

# `struct Scan` of cuda.cu.
POINTERS = (
    "u", "dt", "z", "B", "C", "dy", "A", "D", "bias", "initial", "dfinal", "marks", "entry", "totals", "starts",
    "y", "du", "ddt", "dz", "final", "dinitial", "dBC", "sums", "dA", "dD", "dbias", "dB", "dC",
)  # fmt: skip
ARGUMENTS = struct.Struct(f"={len(POINTERS)}Q5q11i4x")


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.selective_scan`."""
    reason = why_not(u, dt, A, B, C, z)
    if reason:
        raise RuntimeError(reason)
    marks = None if seq_idx is None else position_marks(seq_idx)
    args = (u, dt, A, B, C, D, z, dt_bias, initial_state, marks, dt_softplus)
    y, final_state, _ = _forward(*args, torch.is_grad_enabled())
    return y, final_state


def why_not(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> str | None:
    """Why these kernels cannot take such tensors: one sentence with the remedy, or None if they can."""
    if A.shape[1] > STATES:
        return f'the cuda backend scans up to {STATES} states, and A has {A.shape[1]}; use ops.backend("triton")'
    if u.dtype not in TYPES or any(t is not None and t.dtype != u.dtype for t in (dt, B, C, z)):
        return 'the cuda backend scans u, dt, B, C and z of one dtype; use ops.backend("triton") for a mixture'
    return None


class _Launcher:
    """The kernels for some tensors, and what every one of them is told."""

    def __init__(self, marks: Tensor | None, softplus: bool, **tensors: Tensor | None):
        u, A = tensors["u"], tensors["A"]
        assert u is not None and A is not None
        self.device, self.tensors = u.device.index or 0, {**tensors, "marks": marks}
        self.counts = (*u.shape, A.shape[1])
        named = [(name, tensors.get(name)) for name in ("u", "dt", "z", "B", "C")]
        size = u.element_size()
        strides = [(0, 0) if t is None else tuple(stride * size for stride in t.stride()[:2]) for _, t in named]
        self.rows, self.steps = [row for row, _ in strides], [step for _, step in strides]
        channels = [t for name, t in (*named[:3], ("dy", tensors.get("dy"))) if t is not None]
        together = math.gcd(
            16 // size, u.shape[2], *(n for t in channels for n in (t.data_ptr() // size, *t.stride()[:2]))
        )
        self.module = _module(
            self.device,
            TYPES[u.dtype],
            marks is not None,
            tensors.get("z") is not None,
            softplus,
            together if together in (1, 16 // size) else 2,
            self.counts[3] == STATES and all(_in_lumps(t) for _, t in named[3:] if t is not None),
        )

    def parts(self, tiles: int, walking: int, resident: int) -> tuple[int, int]:
        """Into how many parts time is cut, and the chunks of a part.

        `tiles` blocks a part run, `resident` at a time; `walking` blocks find the summary of a part.
        """
        chunks = -(-self.counts[1] // CHUNK)
        return _parts(tiles, walking, chunks, processors(self.device), resident)

    def __call__(
        self, kernels: list[tuple[str, int, int, int]], parts: int, span: int, waiting: bool, /, **more: Tensor
    ) -> None:
        """Start kernels (name, blocks, threads, bytes of shared memory), in turn; `waiting` as in `Module.launch`."""
        found = map({**self.tensors, **more}.get, POINTERS)
        pointers = [0 if t is None else t.data_ptr() for t in found]
        arguments = ARGUMENTS.pack(*pointers, *self.rows, *self.steps, *self.counts, span, parts)
        with torch.cuda.device(self.device):
            self.module.launch(kernels, arguments, waiting)


@functools.cache
def _module(device: int, kind: int, marked: bool, gated: bool, softplus: bool, abreast: int, weighed: bool) -> Module:
    here = Path(__file__).parent
    constants = {
        "TYPE": kind,
        "MARKED": marked,
        "GATED": gated,
        "SOFTPLUS": softplus,
        "ABREAST": abreast,
        "WEIGHED": weighed,
    }
    constants |= {"CHUNK": CHUNK, "TILE": TILE}
    with torch.cuda.device(device):
        code = source(here / "cuda.cu", here / "cuda_backward.cu")
        return Module(code, {name: int(value) for name, value in constants.items()}, device)


@functools.cache
def _parts(tiles: int, walking: int, chunks: int, processors: int, resident: int) -> tuple[int, int]:
    def turns(blocks: int, resident: int) -> float:
        """How many times over a GPU is filled; where it is not, what does run is somewhat faster."""
        full, rest = divmod(blocks, processors * resident)
        return full + (0.4 + 0.6 * math.ceil(rest / processors) / resident if rest else 0)

    best = math.inf, 1, chunks
    for wanted in range(1, min(chunks, max(1, 4 * processors * resident // tiles)) + 1):
        span = -(-chunks // wanted)
        parts = -(-chunks // span)
        best = min(
            best, (span * (turns(tiles * parts, resident) + 0.8 * turns(walking * (parts - 1), WALKS)), parts, span)
        )
    return best[1:]


def _walk_memory(threads: int, size: int, marked: bool) -> int:
    """Bytes of a `struct Desk` of cuda.cu for each warp: ring, B and C as they are and as floats, marks."""
    weights = 2 * STEPS * 2 * STATES * size + (0 if size == 4 else STEPS * 2 * STATES * 4)
    return threads // 32 * (2 * 3 * STEPS * 64 * size + weights + (2 * STEPS * 4 if marked else 0))


def _backward_memory() -> int:
    """Bytes of `struct Block` of cuda_backward.cu: warps' states, elements and results; weights; marks."""
    return THREADS // 32 * (CHUNK // 4 * 1024 + 1024 + 1536) + CHUNK * (2 * STATES + 1) * 4


@op("selective_scan_cuda", fake=lambda u, dt, A, *rest: _outputs(u, A.shape[1], rest[-1]))
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    dt_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, i), final_state (b, i, n), and if `save` the state at the beginning of every chunk."""
    (batch, length, width), n_state = u.shape, A.shape[1]
    y, final_state, starts = _outputs(u, n_state, save)
    if u.numel() == 0:
        return y, final_state.zero_() if initial_state is None else final_state.copy_(initial_state), starts
    launch = _Launcher(
        marks, dt_softplus, u=dense_rows(u), dt=dense_rows(dt), A=plain(A), B=dense_rows(B), C=dense_rows(C),
        D=plain(D), z=None if z is None else dense_rows(z), bias=plain(dt_bias), initial=plain(initial_state),
        y=y, final=final_state, starts=starts if save else None,
    )  # fmt: skip
    threads = WALKERS if length > 1 else 32
    blocks, shared = batch * -(-width // (2 * threads)), _walk_memory(threads, u.element_size(), marks is not None)
    parts, span = launch.parts(blocks, blocks, WALKS)
    kernels = [("forward", blocks * parts, threads, shared)]
    if parts > 1:
        carry = ("carry", -(-batch * STATES * width // 128), 128, 0)
        kernels = [("summarise", blocks * (parts - 1), threads, shared), carry, *kernels]
    launch(kernels, parts, span, True, **_passed(u, parts))
    return y, final_state, starts


@gradient(_forward, outputs="y, final_state, starts", of="u, dt, A, B, C, D, z, dt_bias, initial_state")
def _backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    dt_softplus: bool,
    starts: Tensor,
) -> list[Tensor]:
    dy = torch.zeros_like(u) if dy is None else dy
    batch, length, width = u.shape
    grads = gradients_like(u, dt, A, B, C, D, z, dt_bias, initial_state)
    if u.numel() == 0:
        for grad in grads:
            grad.zero_()
        if initial_state is not None and dfinal_state is not None:
            grads[8].copy_(dfinal_state)
        return grads
    dA, dD, dbias, dinitial = floats = [grads[k].float() for k in (2, 5, 7, 8)]
    launch = _Launcher(
        marks, dt_softplus, u=dense_rows(u), dt=dense_rows(dt), A=plain(A), B=dense_rows(B), C=dense_rows(C),
        D=plain(D), z=None if z is None else dense_rows(z), bias=plain(dt_bias), dy=dy.contiguous(),
        dfinal=plain(dfinal_state), starts=starts, du=grads[0], ddt=grads[1], dz=grads[6], dinitial=dinitial, dA=dA,
        dB=grads[3], dC=grads[4], dD=dD, dbias=dbias,
    )  # fmt: skip
    tiles, walking = batch * -(-width // TILE), batch * -(-width // (2 * WALKERS))
    parts, span = launch.parts(tiles, walking, TURNS)
    dBC = torch.empty((tiles, length, 2 * STATES), dtype=torch.float32, device=u.device)
    sums = torch.empty((batch * parts, STATES + 2, width), dtype=torch.float32, device=u.device)
    finishing = -(-batch * length * 2 * STATES // 1024) + (STATES + 2) * -(-width // 32)
    kernels = [("backward", tiles * parts, THREADS, _backward_memory()), ("finish", finishing, 256, 1024)]
    if parts > 1:
        summarise = (
            "summarise_back",
            walking * (parts - 1),
            WALKERS,
            _walk_memory(WALKERS, u.element_size(), marks is not None),
        )
        kernels = [summarise, ("carry_back", -(-batch * STATES * width // 128), 128, 0), *kernels]
    launch(kernels, parts, span, False, dBC=dBC, sums=sums, **_passed(u, parts))
    for index, value in zip((2, 5, 7, 8), floats, strict=True):
        if value is not grads[index]:
            grads[index].copy_(value)
    return grads


def _in_lumps(x: Tensor) -> bool:
    """Whether 16 bytes of a row of x (b, l, n) can be loaded together."""
    size = x.element_size()
    return all(n % 16 == 0 for n in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size))


def _outputs(u: Tensor, n_state: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final_state = torch.empty((batch, width, n_state), dtype=torch.float32, device=u.device)
    chunks = -(-length // CHUNK) if save else 0
    return y, final_state, torch.empty((batch, chunks, STATES, width), dtype=torch.float32, device=u.device)


def _passed(u: Tensor, parts: int) -> dict[str, Tensor]:
    """The states that parts pass on, and the sums of their steps."""
    if parts == 1:
        return {}
    entry = torch.empty((u.shape[0], parts, STATES, u.shape[2]), dtype=torch.float32, device=u.device)
    return {"entry": entry, "totals": torch.empty_like(entry[:, :, 0])}
