"""E: a mixture of experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..marks import documented, later
from ..reading import validate
from .letter import Letter
from .options import Options

if TYPE_CHECKING:
    from ..config import ModelConfig

Activation = Literal["relu", "gelu", "silu", "swiglu", "relu2", "gelu_erf", "geglu"]
"""gelu is the approximation by tanh, gelu_erf the exact one, relu2 the square of relu; swiglu and geglu (exact)
multiply the activated half of what the first matrix gives with its other half (arXiv 2002.05202)"""
GATED = ("swiglu", "geglu")


@documented
@dataclass(frozen=True)
class ExpertsConfig(Options):
    """A routed mixture of feed-forward experts, letter `E` (MoE-Mamba, section 3.1)."""

    by_layer = ("n_experts",)

    n_experts: int | tuple[int, ...] = 8
    """experts of each layer, of which a token visits top_k; several numbers are those of each layer with experts,
    bottom to top"""
    top_k: int = 1
    """experts that each token is sent to"""
    d_expert: int | None = None
    """hidden width of an expert; if None, such that one expert has 6 d_model^2 weights, about one Mamba layer"""
    activation: Activation = "swiglu"
    """nonlinearity inside an expert"""
    capacity_factor: float | None = None
    """while training, an expert takes floor(capacity_factor * tokens * top_k / n_experts) choices and drops later ones;
    None never drops"""
    n_shared_experts: int = 0
    """experts that every token visits, besides those that it is sent to"""
    balance_weight: float = 0.01
    """weight of the load-balance loss, which is 1 at perfect balance"""
    z_weight: float = 0.001
    """weight of the router's z-loss (arXiv 2202.08906, eq. 5)"""
    bias_rate: float = 0.0
    """loss-free balancing (arXiv 2408.15664): how far a step moves each expert's selection bias against its load"""
    scores: Literal["softmax", "sigmoid"] = later("softmax")
    """what a token's gates are of the router's logits: softmax over all experts, or each expert's sigmoid alone
    (arXiv 2408.15664); chosen ones are not made to sum to 1"""
    router_bias: bool = later(False)
    """a learned bias of each expert's logit"""
    bias: bool = later(False)
    """biases in the experts' matrices"""

    def __post_init__(self) -> None:
        validate(
            self,
            positive=("n_experts", "top_k", "d_expert", "capacity_factor"),
            not_negative=("n_shared_experts", "balance_weight", "z_weight", "bias_rate"),
        )
        fewest = min(self.n_experts) if isinstance(self.n_experts, tuple) else self.n_experts
        if self.top_k > fewest:
            raise ValueError(f"top_k is {self.top_k}, more than n_experts = {fewest}; choose at most that many")

    @property
    def count(self) -> int:
        """n_experts, of the options of one layer (`ModelConfig.sublayers`)."""
        assert isinstance(self.n_experts, int), "these are the options of several layers"
        return self.n_experts

    def width(self, d_model: int) -> int:
        """d_expert of the letter `E`."""
        return self.d_expert or (2 if self.activation in GATED else 3) * d_model

    def parameters(self, d_in: int, d_out: int, d_expert: int) -> tuple[int, int]:
        """(total, active) of a mixture of two-layer experts with its router."""
        rows = up_rows(d_expert, self.activation)
        matrices, biases = d_in * rows + d_expert * d_out, self.bias * (rows + d_out)
        router = (d_in + self.router_bias) * self.count
        shared = self.n_shared_experts
        always = router + shared * matrices + self.bias * (shared * rows + bool(shared) * d_out)
        expert = matrices + biases
        return always + self.count * expert, always + self.top_k * expert


def several(n_experts: int | tuple[int, ...]) -> str:
    """For people: 8, or 8 to 32."""
    if isinstance(n_experts, int):
        return f"{n_experts}"
    fewest, most = min(n_experts), max(n_experts)
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def up_rows(hidden: int, activation: str) -> int:
    """Rows of the first matrix of a feed-forward network."""
    return 2 * hidden if activation in GATED else hidden


class Experts(Letter):
    name, parts = "experts", ("experts",)

    def parameters(self, config: "ModelConfig") -> tuple[int, int]:
        return config.experts.parameters(config.d_model, config.d_model, config.d_expert)

    def routers(self, config: "ModelConfig") -> tuple[ExpertsConfig, ...]:
        return (config.experts,)

    def widths(self, config: "ModelConfig") -> dict[str, int]:
        return {"experts.d_expert": config.d_expert}

    def describe(self, config: "ModelConfig") -> str:
        e = config.experts
        shared = f" + {e.n_shared_experts} shared" if e.n_shared_experts else ""
        scores = "" if e.scores == "softmax" else f", {e.scores} gates"
        return f"experts: {several(e.n_experts)} × {config.d_expert} {e.activation}, top-{e.top_k}{shared}{scores}"
