"""What a model does inside, for one call: hidden states, experts of every token, and what each Mamba layer selects.

Nothing of it is in the way of a model that nobody looks at. What routers chose and the hidden states the model records
itself, as it does for the server and for transformers; what Mamba layers select is heard with hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers import Choice
from ..layers.mamba import SelectiveSSM
from ..model import MoEMamba, Output
from ..state import State


class Selection(NamedTuple):
    """What a Mamba layer made of its input: `h = exp(dt A) h + dt B u`, `y = C h` (arXiv 2312.00752, section 3)."""

    dt: Tensor
    """(b, l, i) step sizes, after softplus: how much a channel takes in of a token, and forgets of those before"""
    B: Tensor
    """(b, l, n)"""
    C: Tensor
    """(b, l, n)"""
    states: Tensor | None
    """(b, l, i, n) h after each token, zero at padding; None if not asked for"""


class Look(NamedTuple):
    """What one call did inside."""

    hidden: tuple[Tensor, ...]
    """(b, l, d) each: the embedding, and the sum after every residual sub-layer"""
    experts: dict[str, Tensor]
    """(b, l, k) of every router, by its name in `model.router_names`: experts chosen, n_experts where there is none"""
    gates: dict[str, Tensor]
    """(b, l, k) their weights"""
    selection: dict[str, Selection]
    """of every Mamba layer, by its name: "layers.0.branches.0"; empty if not asked for"""
    output: Output


def look(
    model: MoEMamba,
    tokens: Tensor,
    state: State | None = None,
    seq_idx: Tensor | None = None,
    *,
    selection: bool = False,
    states: bool = False,
) -> Look:
    """Call a model, and keep what happened inside. Gradients flow as in the call itself.

    Args:
        tokens, state, seq_idx: see `MoEMamba.forward`.
        selection: keep dt, B and C of every Mamba layer.
        states: and its states after each token, which take d_inner * d_state numbers a token and layer.
    Raises:
        ValueError: a shape that does not fit.
    """
    record: list[Choice] = []
    hidden: list[Tensor] = []
    found: dict[str, Selection] = {}
    with ExitStack() as heard, _listening(found):
        if selection or states:
            mixers = iter(state.mixers if state is not None else ())
            for name, module in model.named_modules():
                kind = getattr(module, "state_type", None)
                before = next(mixers, None) if kind is not None else None
                if isinstance(module, SelectiveSSM):
                    heard.enter_context(_selecting(module, before, seq_idx, states, name, found))
        output = model(tokens, state, seq_idx, record=record, hidden=hidden)
    experts, gates = (
        dict(zip(model.router_names, (choice[part] for choice in record), strict=True)) for part in (0, 1)
    )
    return Look(tuple(hidden), experts, gates, found, output)


_heard: ContextVar[dict[str, Selection] | None] = ContextVar("look", default=None)


@contextmanager
def _listening(found: dict[str, Selection]) -> Iterator[None]:
    """Calls from here are those that are looked at; other threads may call the same model meanwhile."""
    token = _heard.set(found)
    try:
        yield
    finally:
        _heard.reset(token)


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _selecting(
    layer: SelectiveSSM,
    before: Any,
    seq_idx: Tensor | None,
    states: bool,
    name: str,
    found: dict[str, Selection],
) -> Any:
    kept: list[Tensor] = []  # u, B, C

    def mine(hook: Callable[..., None]) -> Callable[..., None]:
        return lambda *given: hook(*given) if _heard.get() is found else None

    def of_x_proj(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        kept[:] = [given[0], *made.split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)[1:]]

    def of_norm(place: int) -> Any:
        def heard(_: nn.Module, __: Any, made: Tensor) -> None:
            kept[place] = made

        return heard

    def of_dt_proj(_: nn.Module, __: Any, made: Tensor) -> None:
        u, B, C = kept
        dt = F.softplus(made.float())
        h = _states(u, dt, layer.A_log, B, None if before is None else before.ssm, seq_idx) if states else None
        found[name] = Selection(dt, B, C, h)

    children = dict(layer.named_children())
    norms = [(children[norm], place) for norm, place in (("B_norm", 1), ("C_norm", 2)) if norm in children]
    return _hooked(
        layer.x_proj.register_forward_hook(mine(of_x_proj)),
        *(norm.register_forward_hook(mine(of_norm(place))) for norm, place in norms),
        layer.dt_proj.register_forward_hook(mine(of_dt_proj)),
    )


def _states(u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, initial: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """(b, l, i, n): what the scan puts out with C a unit vector, for one of n after the other."""
    A, u, B = -torch.exp(A_log.float()), u.float(), B.float()
    found = []
    for axis in torch.eye(A.shape[1], device=u.device):
        C = axis.expand_as(B).contiguous()
        options: dict[str, Any] = {"initial_state": initial, "seq_idx": seq_idx, "dt_softplus": False}
        found.append(ops.selective_scan(u, dt, A, B, C, **options)[0])
    return torch.stack(found, -1)
