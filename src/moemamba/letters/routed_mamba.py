"""R: experts inside the Mamba block."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from ..marks import documented
from ..reading import validate
from .experts import GATED, ExpertsConfig, several
from .mamba import Mamba
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig

Projection = Literal["conv", "gate", "out"]

TWO_LAYER = ("d_expert", "activation", "n_shared_experts", "bias")  # of experts that are no single matrix


@documented
@dataclass(frozen=True)
class RoutedMambaConfig(Options):
    """Experts inside the Mamba block, letter `R`: which projections are routed, and how."""

    projections: tuple[Projection, ...] = ("conv", "gate", "out")
    """which projections are experts: conv and gate are the two halves of in_proj, out is out_proj (MoE-Mamba, section
    4.4)"""
    routing: Literal["shared", "independent"] = "shared"
    """shared: one decision a block, linear experts (Routing Mamba, arXiv 2506.18145); independent: a router and
    two-layer experts in each projection (MoE-Mamba, section 4.4)"""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """the experts; d_expert, activation, n_shared_experts and bias concern independent routing alone"""

    def __post_init__(self) -> None:
        validate(self)
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(f"projections is {self.projections!r}; name one or more of conv, gate, out, each once")
        if self.routing == "shared" and self.experts.n_shared_experts:
            raise ValueError(
                f"n_shared_experts is {self.experts.n_shared_experts}, but shared routing has linear experts only; "
                'set it to 0 or choose routing = "independent"'
            )

    def changed(self, changes: dict[str, Any], used: set[str]) -> Self:
        """Its own fields and those of the experts, which have fewer where they are linear."""
        own = {name: value for name, value in changes.items() if name in super(RoutedMambaConfig, self).names()}
        linear = own.get("routing", self.routing) == "shared"
        inside = {name: value for name, value in changes.items() if not (linear and name in TWO_LAYER)}
        used.update(own)
        return dataclasses.replace(self, **{"experts": self.experts.changed(inside, used)} | own)

    def names(self) -> set[str]:
        return super().names() | self.experts.names()

    def counts(self) -> dict[str, int]:
        return {f"experts.{name}": count for name, count in self.experts.counts().items()}

    def of_layer(self, number: int) -> Self:
        return dataclasses.replace(self, experts=self.experts.of_layer(number)) if self.counts() else self

    def unused(self) -> tuple[str, ...]:
        return tuple(f"experts.{name}" for name in TWO_LAYER) if self.routing == "shared" else ()

    def width(self, d_model: int, d_inner: int) -> int:
        """d_expert: a two-layer expert has as many weights as the projection that it replaces."""
        gated = 1.5 if self.experts.activation in GATED else 1.0
        return self.experts.d_expert or max(1, round(d_model * d_inner / (d_model + d_inner) / gated))


class RoutedMamba(Mamba):
    name = "routed Mamba"
    parts: tuple[str, ...] = ("mamba", "routed")

    def check(self, config: "ModelConfig") -> None:
        super().check(config)
        if config.mamba.proj_bias:
            raise ValueError("proj_bias is True, but the projections of R have no biases; set it to False")

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        d, i, routed, experts = config.d_model, config.d_inner, config.routed, config.routed.experts
        shared = routed.routing == "shared"
        parts = [(self.core(config),) * 2]
        if shared:
            parts.append(((d + experts.router_bias) * experts.count,) * 2)
        for name, d_in, d_out in (("conv", d, i), ("gate", d, i), ("out", i, d)):
            if name not in routed.projections:
                parts.append((d_in * d_out,) * 2)
            elif shared:
                parts.append((d_in * d_out * experts.count, d_in * d_out * experts.top_k))
            else:
                parts.append(experts.parameters(d_in, d_out, config.d_routed_expert))
        return sum(total for total, _ in parts), sum(active for _, active in parts)

    def routers(self, config: "ModelConfig") -> tuple[ExpertsConfig, ...]:
        return (config.routed.experts,) * (1 if config.routed.routing == "shared" else len(config.routed.projections))

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return super().widths(config) | {"routed.experts.d_expert": config.d_routed_expert}

    def describe(self, config: "ModelConfig") -> str:
        r = config.routed
        return (
            f"routed Mamba: {several(r.experts.n_experts)} experts in {', '.join(r.projections)}, {r.routing} routing"
        )

    def why_unused(self, name: str) -> str:
        return 'with routing = "independent" R would' if name in TWO_LAYER else ""
