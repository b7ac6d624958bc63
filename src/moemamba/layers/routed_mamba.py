"""Experts inside the Mamba block (MoE-Mamba, section 4.4; Routing Mamba, arXiv 2506.18145)."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..ops.packing import without_padding
from .layer import Result
from .linear import Linear
from .mamba import MambaState, SelectiveSSM, options
from .moe import MoE
from .moe.experts import LinearExperts
from .moe.router import Router
from .moe.routing import Choice, RouterStats, note
from .placing import placed

if TYPE_CHECKING:
    from ..config import ModelConfig


class RoutedMamba(SelectiveSSM):
    """A Mamba layer some of whose projections are experts.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, and inner_norm, inner_norm_eps, conv_bias: as for `Mamba`.
        projections: the routed ones among "conv" and "gate" (the halves of in_proj) and "out" (out_proj).
        shared_routing: True: one router decides for the whole block, experts are linear, and the router's probability
            weighs the output alone (Routing Mamba). False: each projection is its own mixture of two-layer experts.
        n_experts, top_k, capacity_factor, scores, router_bias: see `MoE`.
        d_expert, activation, n_shared_experts, bias: of the two-layer experts; unused with shared routing.
        device, dtype: as for `Mamba`.
    """

    __call__: Callable[..., tuple[Tensor, MambaState, tuple[RouterStats, ...]]]

    @placed
    def __init__(
        self,
        d_model: int,
        n_experts: int,
        projections: Collection[str] = ("conv", "gate", "out"),
        shared_routing: bool = True,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        d_expert: int | None = None,
        top_k: int = 1,
        activation: str = "swiglu",
        capacity_factor: float | None = None,
        n_shared_experts: int = 0,
        scores: str = "softmax",
        router_bias: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **inside: Any,
    ):
        super().__init__(d_model, d_state, d_conv, expand, dt_rank, **inside)
        routing = (top_k, capacity_factor, scores, router_bias)
        self.router = Router(d_model, n_experts, *routing) if shared_routing else None

        def projection(name: str, wide_in: int, wide_out: int) -> nn.Module:
            if name not in projections:
                return Linear(wide_in, wide_out, bias=False)
            if shared_routing:
                return LinearExperts(wide_in, n_experts, wide_out)
            mixture = MoE(
                wide_in,
                n_experts,
                d_expert,
                top_k=top_k,
                activation=activation,
                capacity_factor=capacity_factor,
                n_shared_experts=n_shared_experts,
                d_out=wide_out,
                scores=scores,
                router_bias=router_bias,
                bias=bias,
            )
            mixture.padding_is_zero = True  # of x by `forward`, of y by the scan
            return mixture

        self.conv_proj = projection("conv", d_model, self.d_inner)
        self.gate_proj = projection("gate", d_model, self.d_inner)
        self.out_proj = projection("out", self.d_inner, d_model)

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        routed, experts = config.routed, config.routed.experts
        return cls(
            config.d_model,
            experts.count,
            routed.projections,
            routed.routing == "shared",
            **options(config),
            d_expert=config.d_routed_expert,
            top_k=experts.top_k,
            activation=experts.activation,
            capacity_factor=experts.capacity_factor,
            n_shared_experts=experts.n_shared_experts,
            scores=experts.scores,
            router_bias=experts.router_bias,
            bias=experts.bias,
        )

    @classmethod
    def call(
        cls, layer: Any, x: Tensor, state: Any = None, seq_idx: Tensor | None = None, record: Any = None
    ) -> Result:
        return layer(x, state, seq_idx) if record is None else layer(x, state, seq_idx, record)  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        seq_idx: Tensor | None = None,
        record: list[Choice] | None = None,
    ) -> tuple[Tensor, MambaState, tuple[RouterStats, ...]]:
        """x (b, l, d), seq_idx (b, l) -> y (b, l, d), the state that continues it, and what each router did."""
        if not self.padding_is_zero:
            x = without_padding(x, seq_idx)
        stats: list[RouterStats] = []
        routing = None
        if self.router is not None:
            routing = self.router(x, seq_idx)
            stats.append(routing.stats)
            note(record, routing, x)

        def project(layer: nn.Module, x: Tensor, gated: bool = False) -> Tensor:
            y: Tensor
            if isinstance(layer, LinearExperts):
                y = layer(x.flatten(0, 1), routing, gated).unflatten(0, x.shape[:2])
            elif isinstance(layer, MoE):
                y, layer_stats = layer(x, seq_idx, record)
                stats.append(layer_stats)
            else:
                y = layer(x)
                if gated and routing is not None:  # so that the choice can be learned where `out` has no experts
                    share = sum(routing.gates.unbind(-1)[1:], routing.gates[:, 0])  # in order, for any number of tokens
                    y = y * share.view(*x.shape[:2], 1).to(y.dtype)
            return y

        u, z = project(self.conv_proj, x), project(self.gate_proj, x)
        y, state = self.scan(u, z, state, seq_idx)
        return project(self.out_proj, y, gated=True), state, tuple(stats)
