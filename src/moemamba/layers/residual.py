"""One residual sub-layer: a norm and the letters that share it."""

import dataclasses

from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.arguments import autocast
from ..state import MixerState
from . import Attention, FeedForward, Mamba, MoE, RoutedMamba, RouterStats, make_norm


class Residual(nn.Module):
    """`x + sum of f(norm(x))` over the letters of one sub-layer, which share the norm.

    The last sum is left to whoever comes next: with the norm of the next sub-layer it is one kernel where that is
    compiled, in the forward and in the backward pass.
    """

    def __init__(self, config: ModelConfig, letters: str):
        super().__init__()
        self.letters = letters
        self.norm = make_norm(config.norm, config.d_model)
        self.branches = nn.ModuleList(make_layer(config, letter) for letter in letters)
        for layer in self.branches:
            layer.padding_is_zero = True  # type: ignore[assignment]  # the model sees to it

    def forward(
        self, x: Tensor, y: Tensor | None, states: tuple[MixerState, ...] | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, list[MixerState], list[RouterStats]]:
        """x (b, l, d) and what is still to be added to it -> the same; `states` begins with those of its mixers."""
        x = x if y is None else x + y
        y = None
        h = autocast(self.norm(x))  # the norm's float32 would otherwise be read by every branch
        after: list[MixerState] = []
        stats: list[RouterStats] = []
        for letter, layer in zip(self.letters, self.branches, strict=True):
            x = x if y is None else x + y
            before = None if states is None or letter not in "MAR" else states[len(after)]
            match letter:
                case "M" | "A":
                    y, new = layer(h, before, seq_idx)
                    after.append(new)
                case "R":
                    y, new, inner = layer(h, before, seq_idx)
                    after.append(new)
                    stats += inner
                case "E":
                    y, routed = layer(h, seq_idx)
                    stats.append(routed)
                case _:
                    y = layer(h)
        assert y is not None  # a sub-layer has one letter at least
        return x, y, after, stats


def make_layer(config: ModelConfig, letter: str) -> nn.Module:
    """The module that a letter of the pattern stands for."""
    mamba = dataclasses.asdict(config.mamba)
    match letter:
        case "M":
            return Mamba(config.d_model, **mamba)
        case "R":
            shared = config.routed.routing == "shared"
            inner = config.routed.experts
            return RoutedMamba(
                config.d_model,
                inner.n_experts,
                config.routed.projections,
                shared,
                **mamba,
                d_expert=config.d_routed_expert,
                top_k=inner.top_k,
                activation=inner.activation,
                capacity_factor=inner.capacity_factor,
                n_shared_experts=inner.n_shared_experts,
            )
        case "E":
            experts = config.experts
            return MoE(
                config.d_model,
                experts.n_experts,
                config.d_expert,
                top_k=experts.top_k,
                activation=experts.activation,
                capacity_factor=experts.capacity_factor,
                n_shared_experts=experts.n_shared_experts,
            )
        case "A":
            return Attention(config.d_model, config.n_heads, config.attention.rope_base)
        case _:
            return FeedForward(config.d_model, config.d_ff, config.feedforward.activation, config.feedforward.bias)
