"""One token of each live row through a model, from the buffers of its slots."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import AttentionState, Mamba, MoE, Router
from ..layers.norm import RMSNorm
from ..layers.plain import plain
from ..layers.residual import Residual
from ..model import MoEMamba
from ..state import MixerState


def advance(model: MoEMamba, tokens: Tensor, mixers: list[MixerState], place: Tensor, length: int) -> Tensor:
    """Read a token in each row.

    Args:
        tokens: (b,) int64.
        mixers: the states of b rows, which are overwritten; see `Slots`.
        place: (b,) int64 where the new keys and values go.
        length: keys and values that are looked at.
    Returns:
        (b, d) what the head sees.
    """
    x, done = model.embedding(tokens[:, None]), 0
    y: Tensor | None = None
    for layer in model.layers:
        assert isinstance(layer, Residual)
        own = tuple(mixers[done : done + sum(letter in "MAR" for letter in layer.letters)])
        x, y = _through(layer, x, y, own, place, length)
        done += len(own)
    hidden: Tensor = model.norm(x if y is None else x + y)
    return hidden[:, 0]


def _through(
    layer: Residual, x: Tensor, y: Tensor | None, mixers: tuple[MixerState, ...], place: Tensor, length: int
) -> tuple[Tensor, Tensor | None]:
    """One sub-layer; as there, y is still to be added to x."""
    mixer: Any = layer.branches[0]
    if layer.letters == "M" and isinstance(mixer, Mamba) and _fused(layer, x):
        weights, norm = mixer.weights_of_step(x), _norm(layer.norm, x)
        if weights is not None and norm is not None:
            weight, bias, eps = norm
            x = x if y is None else x + y
            tensors = (*mixers[0], *weights, weight, bias)
            return ops.mamba_step(x, *tensors, eps=eps, in_place=True)[0], None  # type: ignore[arg-type]
    served = layer.letters == "E" and plain(layer, Residual) and plain(mixer, MoE)
    if served and plain(mixer.router, Router) and not torch.is_autocast_enabled(x.device.type):
        x = x if y is None else x + y
        return x, mixer.serve(layer.norm(x))
    x, y, after, _ = layer(x, y, tuple(_seen(mixer, length) for mixer in mixers), None)
    for buffers, new in zip(mixers, after, strict=True):
        if isinstance(buffers, AttentionState):  # the new entry is the last
            row = torch.arange(len(place), device=place.device)
            buffers.keys[row, :, place] = new[0][:, :, -1].to(buffers.keys.dtype)
            buffers.values[row, :, place] = new[1][:, :, -1].to(buffers.values.dtype)
            buffers.positions[row, place] = new[2][:, -1]
        else:
            for buffer, tensor in zip(buffers, new, strict=True):
                buffer.copy_(tensor)
    return x, y


def _seen(mixer: MixerState, length: int) -> MixerState:
    if not isinstance(mixer, AttentionState):
        return mixer
    keys, values, positions = mixer
    return AttentionState(keys[:, :, :length], values[:, :, :length], positions[:, :length])


def _fused(layer: Residual, x: Tensor) -> bool:
    """Whether norm, layer and sum may be one kernel; that of the CPU is the layer's alone."""
    return plain(layer, Residual) and ops.choose("mamba_step", x) != "cpu"


def _norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and epsilon of a norm that `ops.mamba_step` knows."""
    if plain(norm, RMSNorm):
        weight, bias, eps = norm.weight, None, norm.eps
    elif plain(norm, nn.LayerNorm):
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        if bias is None:
            return None
    else:
        return None
    return None if weight is None or weight.dtype != x.dtype else (weight, bias, eps)  # type: ignore[return-value]
