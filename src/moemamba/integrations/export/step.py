"""One step of generation as a function of tensors alone, which other programs can run: tokens and state in, logits and
state out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...layers import Routing
from ...layers.moe.experts import Experts, LinearExperts
from ...model import MoEMamba
from ...ops.experts import ACTIVATIONS
from ...state import State


class Step(nn.Module):
    """`forward(tokens, *state)`: tokens (b,) int64 -> logits (b, v), and the state after them.

    The state is a flat list of tensors (b, ...), zeros before the first token. Names and shapes are in `names` and
    `shapes`. It is computed in plain PyTorch, with the matrices of the chosen experts gathered for each token, so that
    one graph holds for every routing.
    """

    def __init__(self, model: MoEMamba):
        super().__init__()
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Experts):
                    setattr(module, name, GatheredExperts(child))
                elif isinstance(child, LinearExperts):
                    setattr(module, name, GatheredLinear(child))
        with torch.no_grad(), ops.backend("reference"):
            state = self.model(torch.zeros((1, 1), dtype=torch.int64)).state
        self.kinds: list[type[Any]] = [type(mixer) for mixer in state.mixers]
        self.names = [f"{index}.{field}" for index, kind in enumerate(self.kinds) for field in kind._fields]
        self.shapes = [tuple(tensor.shape[1:]) for mixer in state.mixers for tensor in mixer]

    def empty(self, rows: int) -> list[Tensor]:
        """The state of sequences that have not begun."""
        return [torch.zeros(rows, *shape) for shape in self.shapes]

    def forward(self, tokens: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        parts, mixers = iter(flat), []
        for kind in self.kinds:
            mixers.append(kind(*(next(parts) for _ in kind._fields)))
        hidden, state, _ = self.model.backbone(tokens[:, None], State(tuple(mixers)))
        return self.model.head(hidden[:, 0]), *(tensor for mixer in state.mixers for tensor in mixer)


class GatheredExperts(nn.Module):
    """`Experts` whose matrices are gathered for every token: right for few of them, whatever the routing."""

    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, experts: Experts):
        super().__init__()
        self.activation = ACTIVATIONS[experts.activation]
        self.up_proj, self.down_proj = experts.up_proj, experts.down_proj
        for name in ("up_bias", "down_bias"):
            self.register_parameter(name, experts._parameters[name])

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (t, d) -> (t, d_out)."""
        hidden = gathered(x[:, None], self.up_proj, self.up_bias, routing.indices)
        y = gathered(self.activation(hidden), self.down_proj, self.down_bias, routing.indices)
        return (y * routing.gates[..., None]).sum(1)


class GatheredLinear(LinearExperts):
    """`LinearExperts` in the same way; one of them, since that is how R tells them from other projections."""

    def __init__(self, experts: LinearExperts):
        nn.Module.__init__(self)
        self.weight = experts.weight

    def forward(self, x: Tensor, routing: Routing, gated: bool) -> Tensor:
        """x (t, d) -> (t, d_out)."""
        y = gathered(x[:, None], self.weight, None, routing.indices)
        return (y * routing.gates[..., None] if gated else y).sum(1)


def gathered(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """x (t, 1 or k, d), weight (e, f, d), indices (t, k) -> (t, k, f): each choice's product with its expert."""
    y = (weight[indices] @ x[..., None]).squeeze(-1)
    return y if bias is None else y + bias[indices]


def program(step: Step) -> torch.export.ExportedProgram:
    """The step as a graph of PyTorch's own operations, for any number of rows."""
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    tokens, state = torch.zeros(3, dtype=torch.int64), tuple(step.empty(3))
    dynamic = ({0: rows}, tuple({0: rows} for _ in state))
    with torch.no_grad(), ops.backend("reference"):
        return torch.export.export(step, (tokens, *state), dynamic_shapes=dynamic, strict=False)
