"""Sparse mixture of experts: a router that chooses, experts that compute (MoE-Mamba, section 3.1; arXiv 2101.03961)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.arguments import autocasts, exactly
from ...ops.experts import GATED
from ...ops.packing import without_padding
from ..feedforward import FeedForward
from ..layer import Layer, Prepared, Result
from ..norm import norm_alone
from ..placing import placed
from ..plain import plain
from ..quantised import packed_names, weight_of
from ..roles import Role, composed
from .experts import Experts
from .router import Router
from .routing import Choice, RouterStats, Routing, note, route

if TYPE_CHECKING:
    from ...config import ModelConfig


class MoE(Layer):
    """A mixture-of-experts layer: every token passes through its `top_k` experts, weighed by the router's probability.

    Args:
        d_model: width of the input, d.
        n_experts: e.
        d_expert: hidden width of an expert, f; if None, such that an expert has 6 d_model^2 weights.
        top_k: experts that each token visits.
        activation: see `ops.expert_feedforward`.
        capacity_factor: see `Router`; None never drops.
        n_shared_experts: experts that every token visits besides, computed as one dense layer.
        d_out: width of the output; d_model if None.
        scores, router_bias: see `Router`.
        bias: whether experts have biases, shared ones too.
        router: one of your own in place of ours, such as a `layers.BaseRouter`, which chooses among n_experts; then
            top_k, capacity_factor, scores and router_bias are its own affair.
        device, dtype: of the parameters; the router stays float32 at least.

    A training loop adds `stats.loss()` of what is returned, without which most tokens soon visit few experts; a model
    has done so in `Output.auxiliary`.
    """

    __call__: Callable[..., tuple[Tensor, RouterStats]]

    @placed
    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_expert: int | None = None,
        *,
        top_k: int = 1,
        activation: str = "swiglu",
        capacity_factor: float | None = None,
        n_shared_experts: int = 0,
        d_out: int | None = None,
        scores: str = "softmax",
        router_bias: bool = False,
        bias: bool = False,
        router: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_expert = d_expert or (2 if activation in GATED else 3) * d_model
        d_out = d_out or d_model
        own = (d_model, n_experts, top_k, capacity_factor)
        self.router = Router(*own, scores=scores, bias=router_bias) if router is None else router
        self.experts = Experts(d_model, n_experts, d_expert, d_out, activation, bias)
        shared = n_shared_experts * d_expert
        self.shared = FeedForward(d_model, shared, activation, bias, d_out) if shared else None

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        experts = config.experts
        return cls(
            config.d_model,
            experts.count,
            config.d_expert,
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
        y, stats = layer(x, seq_idx) if record is None else layer(x, seq_idx, record)
        return y, None, (stats,)

    def roles(self) -> dict[str, Role]:
        """The output is that of the experts, the shared ones too."""
        return composed(self, "experts", "shared")

    def forward(
        self,
        x: Tensor,
        seq_idx: Tensor | None = None,
        record: list[Choice] | None = None,
        routing: Routing | Choice | None = None,
    ) -> tuple[Tensor, RouterStats]:
        """The tokens through their experts.

        Args:
            x: (b, l, d), or (t, d) of tokens in no order, which are one sequence then.
            seq_idx: (b, l); negative entries are padding.
            record: a list to which the choices are appended, (b, l, k).
            routing: choices made elsewhere, in place of the router's: a `Choice` (b, l, k), such as one of a record, to
                replay it, or (t, k) as x; or a `Routing`, as `layers.route` makes it.
        Raises:
            ValueError: a shape that does not fit, or an expert that there is not.
        Returns:
            y (b, l, d_out), zero where dropped or padding, and what the router did.
        """
        if x.ndim == 2:
            if isinstance(routing, Choice) and routing.indices.ndim == 2:
                routing = Choice(*(part[None] for part in routing))
            y, stats = self(x[None], None if seq_idx is None else seq_idx[None], record, routing)
            return y[0], stats
        if not self.padding_is_zero:
            x = without_padding(x, seq_idx)
        if routing is None:
            routing = self.router(x, seq_idx)
        elif isinstance(routing, Choice):
            if routing.indices.shape[:2] != x.shape[:2]:
                shape, of = tuple(routing.indices.shape), tuple(x.shape[:2])
                raise ValueError(f"routing has choices of shape {shape}; expected (b, l, k) with (b, l) = {of} as x")
            routing = route(*routing, self.experts.n_experts, seq_idx)
        assert isinstance(routing, Routing)
        note(record, routing, x)
        y = self.experts(x.flatten(0, 1), routing).unflatten(0, x.shape[:2])
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if seq_idx is None else shared.masked_fill(seq_idx[..., None] < 0, 0))
        return y, routing.stats

    def positionwise(self) -> bool:
        """In evaluation, where no expert is ever full; a router of one's own may look at whole sequences."""
        return plain(self, MoE) and plain(self.router, Router)

    def step(self, x: Tensor, buffers: Any, live: int, place: Tensor) -> Tensor:
        """Without what the router did, where the layer is what it was built as."""
        if self.positionwise() and not autocasts(x.device.type):
            return self.serve(x)
        return super().step(x, buffers, live, place)

    def step_with_norm(self, x: Tensor, norm: nn.Module, buffers: Any, live: int, place: Tensor) -> Tensor | None:
        router, experts, normed = self.router, self.experts, norm_alone(norm, x)
        if normed is None or torch.is_grad_enabled() or autocasts(x.device.type):
            return None
        if self.why_not_fused() or not (plain(self, MoE) and plain(router, Router) and plain(experts, Experts)):
            return None
        assert isinstance(router, Router)
        weights = (router.weight, router.balance_bias, experts.up_proj, experts.down_proj, router.top_k)
        if packed_names(experts) or not ops.fuses_moe_step(x, *weights):
            return None
        weight, bias, eps = normed
        return ops.moe_step(
            x,
            *weights,
            activation=experts.activation,
            logit_bias=router.bias,
            scores=router.scores,
            up_bias=experts.up_bias,
            down_bias=experts.down_bias,
            norm_weight=weight,
            norm_bias=bias,
            eps=eps,
        )

    def why_not_fused(self) -> str | None:
        """Which option the kernels of a whole step know nothing of; None if they know all of this layer's."""
        if self.shared is not None:
            return "n_shared_experts > 0: the kernels of a step know no shared experts"
        if self.experts.group is not None:
            return "the experts are spread over processes: the kernels of a step read all of them"
        return None

    def prepare(self, buffers: Any, x: Tensor, y: Tensor) -> Prepared:
        here = plain(self, MoE) and plain(self.router, Router) and plain(self.experts, Experts)
        choose = compute = None
        if here and self.shared is None and self.experts.group is None:
            router, experts = self.router, self.experts
            assert isinstance(router, Router)
            indices = torch.empty(x.shape[0], router.top_k, dtype=torch.int64, device=x.device)
            gates = x.new_empty(x.shape[0], router.top_k)
            choose = ops.prepare_router(
                x,
                router.weight,
                router.balance_bias,
                indices,
                gates,
                logit_bias=router.bias,
                scores=router.scores,
            )
            biases = {"up_bias": experts.up_bias, "down_bias": experts.down_bias}
            up, down = weight_of(experts, "up_proj"), weight_of(experts, "down_proj")
            compute = ops.prepare_experts(x, indices, gates, up, down, y, activation=experts.activation, **biases)
        if choose is None or compute is None:
            return super().prepare(buffers, x, y)
        first, second = choose, compute

        def step(live: int, room: int, place: Tensor) -> None:
            first(live)
            second(live)

        return step

    def serve(self, x: Tensor) -> Tensor:
        """`forward` in evaluation, without what the router did: for few tokens that costs more than the experts."""
        with exactly(x.device.type):
            router, tokens = self.router, x.flatten(0, 1)
            assert isinstance(router, Router)
            weights = (router.weight, router.balance_bias, router.top_k)
            choice = Choice(*ops.router_choices(tokens, *weights, logit_bias=router.bias, scores=router.scores))
        y: Tensor = self.experts(x.flatten(0, 1), choice).unflatten(0, x.shape[:2])
        return y if self.shared is None else y + self.shared(x)
