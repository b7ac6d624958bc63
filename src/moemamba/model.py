"""The language model: an embedding, residual sub-layers from the letters of a pattern, and a head."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import ops
from .config import ModelConfig
from .layers import Attention, AttentionState, FeedForward, Mamba, MoE, RoutedMamba, Router, RouterStats, make_norm
from .layers.linear import Linear, residual_weights
from .layers.moe import Experts, LinearExperts
from .ops.arguments import autocast
from .ops.packing import without_padding
from .state import KINDS, MixerState, State


class Output(NamedTuple):
    """What the model returns."""

    logits: Tensor | None
    """(b, l, v); None where targets were given"""
    state: State
    """what continues the sequences"""
    router: tuple[RouterStats, ...]
    """one for each router, bottom to top"""
    loss: Tensor | None = None
    """() mean cross-entropy in nats, float32, without auxiliary losses; None without targets"""


class MoEMamba(nn.Module):
    """A language model of any pattern of `ModelConfig`.

    Forward, chunked prefill, decoding and truncated back-propagation are one call with different lengths.

    `torch.export` takes it with its state. What it makes is loaded where `moemamba.model` is imported, and the backend
    whose kernels it calls: `moemamba.ops.cpu` for a model that was on the CPU.

    Attributes:
        recompute: keep the inputs of each sub-layer only and compute it again in the backward pass; a router's choices
            are kept, so that they cannot change.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Residual(config, letters) for letters in config.layers)
        self.norm = make_norm(config.norm, config.d_model) if config.final_norm else nn.Identity()
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        initialise(self)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        """Logits for every position, or the loss against targets.

        Args:
            tokens: (b, l) int64.
            state: continues the first sequence of each row.
            seq_idx: (b, l) sequence that each position belongs to; -1 is padding, which changes nothing.
            targets: (b, l) int64; -100 does not count.
        Raises:
            ValueError: a shape that does not fit.
        """
        hidden, state, router = self.backbone(tokens, state, seq_idx)
        if targets is None:
            return Output(self.head(hidden), state, router)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {tuple(tokens.shape)} as tokens")
        return Output(None, state, router, self.head(hidden, targets))

    def backbone(
        self, tokens: Tensor, state: State | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State, tuple[RouterStats, ...]]:
        """As `forward`, up to what the head sees: hidden (b, l, d), state, router statistics."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (batch, length)")
        if seq_idx is not None and seq_idx.shape != tokens.shape:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; expected {tuple(tokens.shape)} as tokens")
        if state is not None:
            self._expect_own(state, tokens.shape[0])
        x: Tensor = without_padding(self.embedding(tokens), seq_idx)  # and so it stays through all layers
        y: Tensor | None = None
        mixers: list[MixerState] = []
        router: list[RouterStats] = []
        for layer in self.layers:
            before = None if state is None else state.mixers[len(mixers) :]
            if self.recompute and torch.is_grad_enabled() and not ops.transformed(x):  # torch.func cannot
                x, y, after, stats = checkpoint(
                    ops.bound(layer),
                    x if y is None else x + y,  # one tensor to keep, not two
                    None,
                    before,
                    seq_idx,
                    use_reentrant=False,
                    context_fn=_keep_choices,
                    preserve_rng_state=False,  # nothing here is random
                )
            else:
                x, y, after, stats = layer(x, y, before, seq_idx)
            mixers += after
            router += stats
        return self.norm(x if y is None else x + y), State(tuple(mixers)), tuple(router)

    def _expect_own(self, state: State, rows: int) -> None:
        letters = [letter for layer in self.layers for letter in layer.letters if letter in "MAR"]  # type: ignore[union-attr]
        own = "".join("A" if letter == "A" else "M" for letter in letters)
        given = "".join("A" if isinstance(mixer, AttentionState) else "M" for mixer in state.mixers)
        if given != own:
            raise ValueError(
                f"state is of the mixers {given!r} (A attention, M Mamba), and this model's are {own!r}; "
                "a state continues the model that it came from"
            )
        if own and state.batch_size != rows:
            raise ValueError(f"state holds {state.batch_size} rows and tokens {rows}; they must be as many")

    def compile_layers(self, **options: Any) -> None:
        """`torch.compile` each residual sub-layer, in place: names in `state_dict` stay as they are.

        Layers of one letter share one compilation, so that a model of any depth starts as fast as one of its pattern.

        Args:
            options: of `torch.compile`.
        """
        settings = torch._dynamo.config
        settings.optimize_ddp = False  # a layer is one graph, not cut where DistributedDataParallel's buckets end
        settings.recompile_limit = max(settings.recompile_limit, 8 * len(set(self.config.layers)))  # of one function
        for layer in self.layers:
            layer.compile(**options)

    @property
    def router_names(self) -> tuple[str, ...]:
        """Where each router sits, in the order of `Output.router`: "layers.1.branches.0"."""
        return tuple(
            name.removesuffix(".router") for name, module in self.named_modules() if isinstance(module, Router)
        )

    def update_balance_bias(self, router: tuple[RouterStats, ...]) -> None:
        """Loss-free balancing: after a step, move each router's selection bias against its load."""
        routers = [module for module in self.modules() if isinstance(module, Router)]
        for module, stats, experts in zip(routers, router, self.config.routers, strict=True):
            if experts.bias_rate:
                module.update_balance_bias(stats.load, experts.bias_rate)


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


class Head(Linear):
    """The projection to the vocabulary; with targets, straight to the loss, without ever holding the logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """(b, l, d) -> logits (b, l, v), or the mean cross-entropy against targets (b, l)."""
        if targets is None:
            return super().forward(input)
        total = ops.linear_cross_entropy(input.flatten(0, 1), self.weight, targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)  # 0 where nothing counts, which adds nothing to a mean


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


def overwrite(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter."""
    with torch.no_grad():
        parameter.copy_(values)


def initialise(model: MoEMamba, fill: Callable[[Tensor, Tensor], None] = overwrite) -> None:
    """Draw the weights again as `config.init` says, from torch's global generator.

    Both leave the Mamba layers' own parameters as the layer draws them (mamba_ssm's initialisation), but "default"
    divides what writes into the residual stream by the square root of its depth (as GPT-2 and mamba_ssm's models do).
    "paper" is that of MoE-Mamba's authors: truncated normal of variance 0.1 / fan_in, cut at +-0.2, where the fan-in of
    the experts' second matrix counts all experts.

    Args:
        fill: puts drawn values, which are on the CPU, into a parameter.
    """
    if model.config.init == "paper":
        for module in model.modules():
            for weight, fan_in in _paper_fan_in(module):
                values = torch.empty(weight.shape)
                fill(weight, nn.init.trunc_normal_(values, std=math.sqrt(0.1 / fan_in), a=-0.2, b=0.2))
        return
    for weight in (model.embedding.weight, model.head.weight):
        fill(weight, nn.init.normal_(torch.empty(weight.shape), std=0.02))
    with torch.no_grad():
        for layer in model.layers:
            for branch in layer.branches:  # type: ignore[union-attr]
                for weight in residual_weights(branch):
                    weight.div_(math.sqrt(len(model.layers)))


def draw(model: MoEMamba, fill: Callable[[Tensor, Tensor], None], seed: int) -> None:
    """Give a model that was built on the meta device the weights that `MoEMamba(config)` has, a sub-layer at a time.

    Args:
        fill: puts values, which are on the CPU, into a parameter or buffer, which may be sharded.
        seed: the weights are those after `torch.manual_seed(seed)`; torch's global generators stay as they are.
    """
    with torch.device("cpu"), _Drawing(torch.Generator("cpu").manual_seed(seed)):
        _draw(model, fill)


class _Drawing(TorchFunctionMode):
    """Draw from this generator, in this thread, what would come from torch's global one."""

    FUNCTIONS = frozenset(
        {
            Tensor.normal_,
            Tensor.uniform_,
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.trunc_normal_,
            nn.init.kaiming_uniform_,
        }
    )

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FUNCTIONS and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def _draw(model: MoEMamba, fill: Callable[[Tensor, Tensor], None]) -> None:
    config = model.config
    makers: list[tuple[nn.Module, Callable[[], nn.Module]]] = [
        (model.embedding, lambda: nn.Embedding(config.vocab_size, config.d_model)),
        *(
            (layer, partial(Residual, config, letters))
            for layer, letters in zip(model.layers, config.layers, strict=True)
        ),
        (model.norm, lambda: make_norm(config.norm, config.d_model) if config.final_norm else nn.Identity()),
        (model.head, lambda: Head(config.d_model, config.vocab_size, bias=False)),
    ]
    for module, make in makers:
        values = make().state_dict()
        for name, tensor in module.state_dict(keep_vars=True).items():
            fill(tensor, values[name])
    drawn: set[int] = set()

    def fill_once(parameter: Tensor, values: Tensor) -> None:
        """A tied head is drawn too, but the embedding's values stay."""
        if id(parameter) not in drawn:
            fill(parameter, values)
        drawn.add(id(parameter))

    initialise(model, fill_once)


def _paper_fan_in(module: nn.Module) -> list[tuple[Tensor, int]]:
    match module:
        case nn.Embedding():
            return [(module.weight, 1)]
        case Head() | Router():
            return [(module.weight, module.weight.shape[1])]
        case Attention():
            return [(layer.weight, layer.in_features) for layer in (module.qkv_proj, module.out_proj)]
        case FeedForward():
            return [(layer.weight, layer.in_features) for layer in (module.up_proj, module.down_proj)]
        case Experts():
            return [
                (module.up_proj, module.up_proj.shape[2]),
                (module.down_proj, module.down_proj.shape[0] * module.down_proj.shape[2]),
            ]
        case LinearExperts():
            return [(module.weight, module.weight.shape[2])]
    return []


_ROUTERS = ("moemamba::route_with_totals",)  # by name, since a backend defines its ops when it is first used


def _save_choices(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    chosen = op in (torch.ops.aten.topk.default, torch.ops.aten.argmax.default) or op.name() in _ROUTERS
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


_keep_choices: Callable[[], Any] = partial(create_selective_checkpoint_contexts, _save_choices)

# torch.export.save writes what a program takes and returns by these names; of its own accord it knows no NamedTuple's.
for _kind in (Output, RouterStats, *KINDS.values()):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"moemamba.{_kind.__name__}")
