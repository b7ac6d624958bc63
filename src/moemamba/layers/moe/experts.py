"""Experts: feed-forward networks and single matrices, stacked."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import ops
from ...ops.experts import GATED
from ..quantised import weight_of
from ..roles import MATRIX, Role
from .exchange import held, visit_experts
from .routing import Choice, Routing

BIASES = Role(decays=False, muon=False)
"""of a stack of experts, a vector each"""


class Experts(nn.Module):
    """Two-layer feed-forward experts as stacked matrices.

    Parameters: up_proj (e, f, d), or (e, 2f, d) with the gate's rows first for gated activations; down_proj
    (e, d_out, f); with `bias` up_bias (e, f or 2f) and down_bias (e, d_out), else None.

    Attributes:
        group: processes that hold equal shares of the experts, in order (`exchange.visit_experts`); None: all are here.
    """

    of_8_bits = ("up_proj", "down_proj")
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, d_model: int, n_experts: int, d_expert: int, d_out: int, activation: str, bias: bool = False):
        super().__init__()
        self.n_experts, self.activation = n_experts, activation
        self.group: dist.ProcessGroup | None = None
        rows = 2 * d_expert if activation in GATED else d_expert
        self.up_proj = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_out, d_expert))
        nn.init.uniform_(self.up_proj, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model))
        nn.init.uniform_(self.down_proj, -1 / math.sqrt(d_expert), 1 / math.sqrt(d_expert))
        self.register_parameter("up_bias", nn.Parameter(torch.zeros(n_experts, rows)) if bias else None)
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(n_experts, d_out)) if bias else None)

    def roles(self) -> dict[str, Role]:
        """The fan-in of the second matrix counts all experts, as that of MoE-Mamba's authors does."""
        experts, _, hidden = self.down_proj.shape
        return {
            "up_proj": MATRIX._replace(fan_in=self.up_proj.shape[2]),
            "down_proj": MATRIX._replace(fan_in=experts * hidden, writes_residual=True),
        } | {name: BIASES for name in ("up_bias", "down_bias") if self._parameters[name] is not None}

    def forward(self, x: Tensor, routing: Routing | Choice) -> Tensor:
        """x (t, d) -> (t, d_out)."""
        if self.group is None:
            return self._compute(x, routing.indices, routing.gates)
        return visit_experts(x, routing.indices, routing.gates, self.n_experts, self.group, self._compute)

    def waits(self) -> bool:
        """Whether computing waits for the host, as the reference does, which reads how many tokens an expert has."""
        up, down = weight_of(self, "up_proj"), weight_of(self, "down_proj")
        asked = (up, down, self.activation, self.up_bias, self.down_bias)
        like = up if isinstance(up, Tensor) else up.scale
        return ops.choose("expert_feedforward", like, None, None, *asked) == "reference"

    def _compute(self, x: Tensor, indices: Tensor, gates: Tensor | None = None) -> Tensor:
        up, down = held(weight_of(self, "up_proj")), held(weight_of(self, "down_proj"))
        own = {"up_bias": self.up_bias, "down_bias": self.down_bias}
        biases = {name: None if bias is None else held(bias) for name, bias in own.items()}
        return ops.expert_feedforward(x, indices, gates, up, down, activation=self.activation, **biases)


class LinearExperts(nn.Module):
    """One matrix an expert: `weight` (e, d_out, d). `group` as in `Experts`."""

    of_8_bits = ("weight",)

    def __init__(self, d_model: int, n_experts: int, d_out: int):
        super().__init__()
        self.n_experts = n_experts
        self.group: dist.ProcessGroup | None = None
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_model))
        nn.init.uniform_(self.weight, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model))

    def forward(self, x: Tensor, routing: Routing, gated: bool) -> Tensor:
        """x (t, d) -> (t, d_out): the sum of the chosen experts, each weighed by its gate if `gated`."""
        gates = routing.gates if gated else None
        if self.group is None:
            return self._compute(x, routing.indices, gates)
        return visit_experts(x, routing.indices, gates, self.n_experts, self.group, self._compute)

    def roles(self) -> dict[str, Role]:
        return {"weight": MATRIX._replace(fan_in=self.weight.shape[2], writes_residual=True)}

    def _compute(self, x: Tensor, indices: Tensor, gates: Tensor | None = None) -> Tensor:
        return ops.expert_linear(x, indices, gates, held(weight_of(self, "weight")))
