"""Models of an active size, as a law sees them: shape, expected loss, recipe and memory. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...config import ModelConfig
from ...counting import ParameterCount, count_parameters, flops_per_token, memory
from ...presets import preset
from ..compare import CLOSE, sized
from .law import Anchor, Law

EXPERTS = (1, 4, 8, 16, 32, 64, 128)  # for each that a token visits
ASPECT = 32  # channels for each Mamba layer of a dense model, as in the 25M models of the paper
TOP_K = 4  # experts that a token visits, each half as wide as the model, as in moe-mamba-25m-plus
BATCH_GROWS = 0.5  # with this power of the tokens, about as the critical batch does (arXiv 2410.21676)
CONTEXT = 1024


@dataclass(frozen=True)
class Plan:
    """A model to train."""

    experts: float
    """for each that a token visits"""
    model: ModelConfig
    parameters: ParameterCount
    tokens: float
    loss: float
    """expected, nats a token"""
    beyond: tuple[str, ...]
    """where that lies outside what the law was fitted to"""
    learning_rate: float
    batch_size: int
    """sequences of `CONTEXT` tokens"""
    steps: int
    operations: float
    """floating-point operations of the whole training"""
    memory: int
    """bytes of weights, gradients and AdamW's moments in float32; activations come on top"""

    @property
    def command(self) -> str:
        """What trains it."""
        model, changes = (
            self.model,
            [f"--model.d-model {self.model.d_model}", f"--model.n-blocks {self.model.n_blocks}"],
        )
        if model.routers:
            experts = model.experts
            changes.append(f"--model.experts.n-experts {experts.n_experts} --model.experts.d-expert {experts.d_expert}")
        recipe = f"--learning-rate {self.learning_rate:.3g} --batch-size {self.batch_size} --context {CONTEXT}"
        name = "moe-mamba-25m-plus" if model.routers else "mamba-25m-plus"
        return f"moemamba train {name} {' '.join(changes)} {recipe} --steps {self.steps}"


def plans(law: Law, active: float, tokens: float, experts: Sequence[int] | None = None) -> list[Plan]:
    """Models of so many active parameters, with more and more experts; those that the law has seen if not told which.

    Raises:
        ValueError: no model has so few or so many, or the law says nothing of them.
    """
    low, high = law.fitted.experts
    asked = experts or [e for e in EXPERTS if low / 1.02 <= e <= 1.02 * high] or [1]
    return [_plan(law, active, tokens, each) for each in asked]


def _plan(law: Law, active: float, tokens: float, experts: int) -> Plan:
    model = shaped(active, experts)
    count = count_parameters(model)
    anchor = min(law.anchors, key=lambda each: abs(math.log(each.experts / experts)))
    batch = _batch(anchor, tokens)
    needs = memory(model)
    return Plan(
        experts,
        model,
        count,
        tokens,
        law.loss(count.active, tokens, experts),
        tuple(law.beyond(count.active, tokens, experts)),
        anchor.learning_rate * anchor.d_model / model.d_model,  # as muP has it for matrices (arXiv 2203.03466)
        batch,
        max(1, round(tokens / (batch * CONTEXT))),
        3 * flops_per_token(model, CONTEXT) * tokens,
        sum(needs),
    )


def _batch(anchor: Anchor, tokens: float) -> int:
    """Sequences of a step: a power of two."""
    wanted = anchor.batch_tokens * (tokens / anchor.tokens) ** BATCH_GROWS / CONTEXT
    return int(2 ** max(0, round(math.log2(wanted))))


def shaped(active: float, experts: int) -> ModelConfig:
    """A model of the plus presets' kind with so many active parameters, within 1%, deeper where it is wider.

    Raises:
        ValueError: none has so few or so many.
    """
    if not 1e4 <= active <= 1e12:
        raise ValueError(f"active is {active:g} parameters; choose from 10k to 1000B")
    width = 32 * max(1, round(_width(active) / 32))
    if experts == 1:
        near = range(max(32, width - 96), width + 97, 32)
        every = [preset("mamba-25m-plus", d_model=d, n_blocks=n) for d in near for n in _depths(d)]
        return min(every, key=lambda model: abs(count_parameters(model).active - active))
    model = preset(
        "moe-mamba-25m-plus",
        d_model=width,
        n_blocks=max(1, round(width / ASPECT / 2)),
        n_experts=TOP_K * experts,
        top_k=TOP_K,
        d_expert=max(1, width // 2),
    )
    return model if abs(count_parameters(model).active - active) <= CLOSE * active else sized(model, active)


def _depths(d_model: int) -> range:
    """Mamba layers that go with a width."""
    usual = max(2, round(d_model / ASPECT))
    return range(max(1, usual - usual // 3), usual + usual // 3 + 1)


def _width(active: float) -> float:
    """d_model of a dense model whose layers are d_model / ASPECT: about 6 d^2 weights in each."""
    return (active * ASPECT / 6.5) ** (1 / 3)
