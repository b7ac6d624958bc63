"""The causal depthwise convolution on a GPU: SiLU, state and packed rows fused; a custom op with its gradient.

A position's window is found by index: `source` is a row of x, or if negative a row of the history before it (-1 the last),
or below that nothing. Without `seq_idx` it is the position minus the tap; with it, `packing.taps` says. The forward pass
takes a tile of positions and channels. The backward pass walks a segment of time backwards, since what a position sends
back to the tokens before it passes through them in order; rows read again come from the first-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import boundaries, taps
from .triton_scan import position_marks
from .triton_scan_kernels import BEGIN, PADDING, PLAIN, _sigmoid, _wide

# Positions and channels of a program's tile (forward), channels and positions of a segment (backward).
FORWARD = {"T": 16, "I": 128, "num_warps": 4}
BACKWARD = {"K": 4, "I": 128, "num_warps": 1}
SEGMENT = 64


@triton.jit
def _tokens(x, x_t, history, source, channel, inside, HISTORY: tl.constexpr):
    """Rows `source` of x in float32, or of history (i, k - 1) where negative, zeros where neither has them."""
    tokens = tl.load(x + _wide(source) * x_t + channel, mask=inside & (source >= 0), other=0.0).to(tl.float32)
    if history is not None:
        early = inside & (source < 0) & (source >= -HISTORY)
        tokens += tl.load(history + channel * HISTORY + source + HISTORY, mask=early, other=0.0).to(tl.float32)
    return tokens


@triton.jit
def forward_kernel(
    x, weight, bias, history, sources, y, final, x_b, x_t, length, width,
    SILU: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    HISTORY: tl.constexpr = TAPS - 1
    tiles = tl.cdiv(width, I)
    segments = tl.maximum(tl.cdiv(length, T), 1)
    batch = _wide(tl.program_id(0) // tiles // segments)
    segment = tl.program_id(0) // tiles % segments
    channel = (tl.program_id(0) % tiles * I + tl.arange(0, I))[None, :]
    time = (segment * T + tl.arange(0, T))[:, None]
    inside = channel < width
    live = inside & (time < length)
    x += batch * x_b
    if history is not None:
        history += batch * width * HISTORY
    present = live
    if sources is not None:
        sources += batch * (length + 1) * TAPS
        present = live & (tl.load(sources + time * TAPS, mask=time < length, other=-TAPS) >= 0)
    out = tl.zeros((T, I), tl.float32)
    if bias is not None:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(TAPS):
        source = time - back
        if sources is not None:
            source = tl.load(sources + time * TAPS + back, mask=time < length, other=-TAPS)
        tap = tl.load(weight + channel * TAPS + HISTORY - back, mask=inside, other=0.0).to(tl.float32)
        out += tap * _tokens(x, x_t, history, source, channel, live, HISTORY)
    if SILU:
        out *= _sigmoid(out)
    out = tl.where(present, out, 0.0).to(y.dtype.element_ty)
    tl.store(y + batch * length * width + _wide(time) * width + channel, out, mask=live)
    if segment == segments - 1:  # the window of a position after the last is the state left behind
        final += batch * width * HISTORY
        for back in tl.static_range(1, TAPS):
            source = length - back
            if sources is not None:
                source = tl.load(sources + length * TAPS + back)
            token = _tokens(x, x_t, history, source, channel, inside, HISTORY).to(final.dtype.element_ty)
            tl.store(final + channel * HISTORY + HISTORY - back, token, mask=inside)


@triton.jit
def backward_kernel(
    dy, dfinal, x, weight, bias, history, marks, sources, resume, dx, dweight, dbias, dhistory,
    x_b, x_t, length, width, segment_length,
    SILU: tl.constexpr, TAPS: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """dx and dhistory, and sums over this segment for dweight (parts, k, i) and dbias (parts, i).

    `pending[j]` is what later tokens send to the token j + 1 before this position. It begins where the tokens after the
    segment can no longer reach into it, at `resume` (b, segments), or at the end of the row with the final state's gradient.
    """
    HISTORY: tl.constexpr = TAPS - 1
    tiles = tl.cdiv(width, I)
    segments = tl.maximum(tl.cdiv(length, segment_length), 1)
    part = _wide(tl.program_id(0) // tiles)
    batch, segment = part // segments, (tl.program_id(0) // tiles) % segments
    channel = tl.program_id(0) % tiles * I + tl.arange(0, I)
    inside = channel < width
    start = segment * segment_length
    stop = tl.minimum(start + segment_length, length)
    x, dy, dx = x + batch * x_b, dy + batch * length * width, dx + batch * length * width
    end = tl.minimum(stop + HISTORY, length)
    if sources is not None:
        sources, marks = sources + batch * (length + 1) * TAPS, marks + batch * length
        end = tl.load(resume + part)
    if history is not None:
        history += batch * width * HISTORY
    offset = tl.zeros((I,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    kernel, dkernel, pending = (), (), ()
    for back in tl.static_range(TAPS):
        kernel = kernel + (tl.load(weight + channel * TAPS + HISTORY - back, mask=inside, other=0.0).to(tl.float32),)
        dkernel = dkernel + (tl.zeros((I,), tl.float32),)
    for back in tl.static_range(1, TAPS):
        sent = tl.zeros((I,), tl.float32)
        if dfinal is not None:
            mask = inside & (end == length)
            sent = tl.load(dfinal + (batch * width + channel) * HISTORY + HISTORY - back, mask=mask, other=0.0).to(
                tl.float32
            )
        pending = pending + (sent,)
    doffset = tl.zeros((I,), tl.float32)
    for group in range(tl.cdiv(end - start, K)):
        first = end - 1 - group * K
        windows, douts, found = (), (), ()
        for k in tl.static_range(K):
            t = first - k
            live = inside & (t >= start)
            mark = tl.where(t >= start, PLAIN, PADDING)
            if sources is not None:
                mark = tl.load(marks + t, mask=t >= start, other=PADDING).to(tl.int32)
            window = ()
            for back in tl.static_range(TAPS):
                source = t - back
                if sources is not None:
                    source = tl.load(sources + t * TAPS + back, mask=t >= start, other=-TAPS)
                window = window + (_tokens(x, x_t, history, source, channel, live, HISTORY),)
            windows, found = windows + (window,), found + (mark,)
            douts = douts + (tl.load(dy + _wide(t) * width + channel, mask=live, other=0.0).to(tl.float32),)
        for k in tl.static_range(K):
            t = first - k
            out, dout = offset, douts[k]
            for back in tl.static_range(TAPS):
                out += kernel[back] * windows[k][back]
            if SILU:
                open = _sigmoid(out)
                dout *= open * (1.0 + out * (1.0 - open))
            dout = tl.where(found[k] == PADDING, 0.0, dout)
            own = tl.where(t < stop, dout, 0.0)  # positions after the segment count for another program
            doffset += own
            grown, passed, sent = (), (), kernel[0] * dout
            for back in tl.static_range(TAPS):
                grown = grown + (dkernel[back] + own * windows[k][back],)
            if HISTORY > 0:
                sent += pending[0]
            for back in tl.static_range(1, TAPS):
                moved = kernel[back] * dout
                if back < HISTORY:
                    moved += pending[back]
                moved = tl.where(found[k] == BEGIN, 0.0, moved)
                passed = passed + (tl.where(found[k] == PADDING, pending[back - 1], moved),)
            dkernel, pending = grown, passed
            sent = tl.where(found[k] == PADDING, 0.0, sent).to(dx.dtype.element_ty)
            tl.store(dx + _wide(t) * width + channel, sent, mask=inside & (t >= start) & (t < stop))
    for back in tl.static_range(TAPS):
        tl.store(dweight + (part * TAPS + HISTORY - back) * width + channel, dkernel[back], mask=inside)
    tl.store(dbias + part * width + channel, doffset, mask=inside)
    if segment == 0:
        for back in tl.static_range(1, TAPS):
            where = dhistory + (batch * width + channel) * HISTORY + HISTORY - back
            tl.store(where, pending[back - 1].to(dhistory.dtype.element_ty), mask=inside)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `moemamba.ops.causal_conv1d`."""
    marks = sources = resume = None
    if seq_idx is not None and seq_idx.shape[1]:
        marks, sources, resume = _packed(seq_idx, weight.shape[1])
    args = (x, weight, bias, initial_state, marks, sources, resume, activation == "silu")
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _conv(*args)
    return _forward(*args)


def _packed(seq_idx: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What positions are (b, l), where their windows lie (b, l + 1, k), and where each segment's walk begins (b, s)."""
    length = seq_idx.shape[1]
    index, inside = taps(seq_idx, width)
    valid, _ = boundaries(seq_idx)
    time = torch.arange(length + 1, device=seq_idx.device)
    own = torch.where(torch.nn.functional.pad(valid, (0, 1)), time, -width)
    earlier = torch.where(inside, index - (width - 1), -width)
    sources = torch.cat([own[..., None], earlier], dim=-1).to(torch.int32)
    # A walk begins after the (k - 1)th token from the segment's end on: the first place that so many tokens precede.
    tokens = valid.cumsum(1)
    stops = torch.arange(SEGMENT, length + SEGMENT, SEGMENT, device=seq_idx.device).clamp(max=length)
    wanted = tokens[:, stops - 1] + width - 1
    resume = (torch.searchsorted(tokens, wanted) + 1).clamp(max=length).maximum(stops)
    return position_marks(seq_idx), sources.contiguous(), resume.to(torch.int32).contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    sources: Tensor | None,
    resume: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y (b, l, i) and final_state (b, i, k - 1)."""
    (batch, length, width), count = x.shape, weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    final_state = torch.empty((batch, width, count - 1), dtype=x.dtype, device=x.device)
    programs = batch * max(triton.cdiv(length, FORWARD["T"]), 1) * triton.cdiv(width, FORWARD["I"])
    if programs:
        forward_kernel[(programs,)](
            x, weight.contiguous(), bias, history, sources, y, final_state, *x.stride()[:2], length, width,
            SILU=silu, TAPS=count, **FORWARD,
        )  # fmt: skip
    return y, final_state


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    marks: Tensor | None,
    sources: Tensor | None,
    resume: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias, initial_state, in this order; empty where there is no such input."""
    (batch, length, width), count = x.shape, weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    parts = batch * max(triton.cdiv(length, SEGMENT), 1)
    dx = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    dweight = torch.empty((parts, count, width), dtype=torch.float32, device=x.device)
    dbias = torch.empty((parts, width), dtype=torch.float32, device=x.device)
    dhistory = torch.empty((batch, width, count - 1), dtype=torch.float32, device=x.device)
    programs = parts * triton.cdiv(width, BACKWARD["I"])
    if programs:
        backward_kernel[(programs,)](
            dy.contiguous(), None if dfinal is None else dfinal.contiguous(), x, weight.contiguous(), bias, history,
            marks, sources, resume, dx, dweight, dbias, dhistory, *x.stride()[:2], length, width, SEGMENT,
            SILU=silu, TAPS=count, **BACKWARD,
        )  # fmt: skip
    return [
        dx,
        dweight.sum(0).T.to(weight.dtype).contiguous(),
        dx.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
        dx.new_empty(0) if initial_state is None else dhistory.to(initial_state.dtype, copy=True),
    ]


_conv = torch.library.custom_op("moemamba::causal_conv1d", _forward, mutates_args=())
_conv_backward = torch.library.custom_op("moemamba::causal_conv1d_backward", _backward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, initial_state, marks, sources, resume, silu):  # type: ignore[no-untyped-def]
    batch, length, width = x.shape
    return x.new_empty((batch, length, width)), x.new_empty((batch, width, weight.shape[1] - 1))


@_conv_backward.register_fake
def _(dy, dfinal, x, weight, bias, initial_state, marks, sources, resume, silu):  # type: ignore[no-untyped-def]
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state)]


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = _conv_backward(dy, dfinal, *tensors, ctx.silu)
    present = [None if t is None else g for t, g in zip(tensors[:4], grads, strict=True)]
    return (*present, None, None, None, None)


_conv.register_autograd(_differentiate, setup_context=_remember)
