"""A plain Mamba model as one whose inner norms change nothing, for programs whose Mamba always has them.

The model gets spare channels, all zero: the norms before layers divide by a larger width, which their weights and their
epsilon undo. They make room for spare inner channels, of which one is constant: its convolution sees nothing and its
bias b has silu(b) = 1. From it dt, B and C each get one more entry, which is K. Beside it their other entries v are
small, so that a root-mean-square norm divides by K / sqrt(size) but for a factor of 1 - |v|^2 / 2K^2, which float32
does not see, and its weights multiply by as much.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...config import ModelConfig

K = 65536.0
ONE = 1.2784645427610738  # silu(ONE) = 1
SPARE = 32
"""channels at least; widths stay multiples of 32, as quantised formats want"""


def with_idle_norms(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and float32 tensors of a model that computes the same with `inner_norm = "rmsnorm"`.

    Its d_model, d_state and dt_rank are larger. Attention is not known here.
    """
    wide = config.d_model + SPARE + -config.d_model % SPARE
    own = config.replace(
        d_model=wide,
        d_state=config.mamba.d_state + 1,
        dt_rank=config.dt_rank + 1,
        inner_norm="rmsnorm",
        norm_eps=config.norm_eps * config.d_model / wide,
        **({"d_expert": config.d_expert} if "E" in config.pattern else {}),
        **({"d_ff": config.d_ff} if "F" in config.pattern else {}),
    )
    given = {name: tensor.detach().float() for name, tensor in tensors.items()}
    found = {name: _padded(name, tensor, config, own) for name, tensor in given.items()}
    for place in [name.removesuffix("A_log") for name in given if name.endswith(".A_log")]:
        found |= _mamba(place, given, config, own)
    return own, found


def _padded(name: str, tensor: Tensor, config: ModelConfig, own: ModelConfig) -> Tensor:
    """What reads or writes channels of the model, with more of them."""
    more = own.d_model - config.d_model
    if name.endswith("norm.weight"):
        return torch.cat([tensor * math.sqrt(config.d_model / own.d_model), tensor.new_zeros(more)])
    if name.endswith(("down_proj", "down_proj.weight")):  # (..., d, f)
        return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:-2], more, tensor.shape[-1])], dim=-2)
    if name.endswith(("embedding.weight", "head.weight", "up_proj", "up_proj.weight", "router.weight")):
        return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:-1], more)], dim=-1)
    return tensor


def _mamba(place: str, given: Mapping[str, Tensor], config: ModelConfig, own: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a Mamba layer."""
    i, r, n, wide_i, d = config.d_inner, config.dt_rank, config.mamba.d_state, own.d_inner, config.d_model
    old = {name.removeprefix(place): tensor for name, tensor in given.items() if name.startswith(place)}
    new: dict[str, Tensor] = {
        "in_proj.weight": torch.zeros(2 * wide_i, own.d_model),
        "conv1d.weight": torch.zeros(wide_i, 1, config.mamba.d_conv),
        "conv1d.bias": torch.zeros(wide_i),
        "x_proj.weight": torch.zeros(r + 1 + 2 * (n + 1), wide_i),
        "dt_proj.weight": torch.zeros(wide_i, r + 1),
        "dt_proj.bias": torch.zeros(wide_i),
        "A_log": torch.zeros(wide_i, n + 1),
        "D": torch.zeros(wide_i),
        "out_proj.weight": torch.zeros(own.d_model, wide_i),
    }
    new["in_proj.weight"][:i, :d], new["in_proj.weight"][wide_i : wide_i + i, :d] = old["in_proj.weight"].chunk(2)
    for name in ("conv1d.weight", "conv1d.bias", "dt_proj.bias", "D"):
        new[name][:i] = old[name]
    new["dt_proj.weight"][:i, :r] = old["dt_proj.weight"]
    new["A_log"][:i, :n] = old["A_log"]
    new["out_proj.weight"][:d, :i] = old["out_proj.weight"]
    new["conv1d.bias"][i] = ONE
    first = 0
    for name, rows in zip(("dt", "B", "C"), old["x_proj.weight"].split([r, n, n]), strict=True):
        size = len(rows) + 1
        new["x_proj.weight"][first : first + size - 1, :i] = rows
        new["x_proj.weight"][first + size - 1, i] = K
        new[f"{name}_norm.weight"], first = _undoing(size, own.norm_eps), first + size
    return {f"{place}{name}": tensor for name, tensor in new.items()}


def _undoing(size: int, eps: float) -> Tensor:
    """The weights with which a norm of `size` entries, of which the last is K, gives the others as they were.

    As float32 computes it, so that no rounding is the same for all tokens.
    """
    entries = torch.zeros(size)
    entries[-1] = K * torch.nn.functional.silu(torch.tensor(ONE))
    scale = torch.rsqrt(entries.square().mean() + eps)
    weight = (1 / scale.double()).float().expand(size).clone()
    weight[-1] = 0
    return weight
