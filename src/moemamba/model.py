"""The language model: an embedding, residual sub-layers from the letters of a pattern, and a head."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import ops
from .config import ExpertsConfig, ModelConfig, expect_config
from .initialisation import initialise
from .layers import LAYERS, Choice, RouterStats, final_norm, routers
from .layers.head import Head
from .layers.parts import Parts
from .layers.residual import Residual
from .layers.roles import Role, composed
from .letters import LETTERS
from .ops.packing import without_padding
from .state import STATES, State


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
    auxiliary: Tensor | None = None
    """() losses of the routers, weighed by the configuration and averaged; 0 without routers. A loop of your own adds
    it: `(out.loss + out.auxiliary).backward()`. None where neither targets are given nor gradients wanted"""


if TYPE_CHECKING:  # for checkers alone: what there is depends on the call, see `MoEMamba.__call__`

    class Predicted(Output):
        """Of a call without targets."""

        logits: Tensor

    class Scored(Output):
        """Of a call with targets."""

        loss: Tensor
        auxiliary: Tensor


def weighed(router: tuple[RouterStats, ...], experts: tuple[ExpertsConfig, ...], like: Tensor) -> Tensor:
    """() the losses of routers, weighed as the experts of each have it, and averaged: `Output.auxiliary`.

    Args:
        like: says on which device, and in which dtype (float32 at least) where there are no routers.
    """
    total = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    for stats, own in zip(router, experts, strict=True):
        total = total + own.balance_weight * stats.balance_loss + own.z_weight * stats.z_loss
    return total / max(1, len(router))


class Backbone(nn.Module):
    """What is below the head: an embedding, residual sub-layers and a norm, which whoever inherits this puts there.

    Attributes:
        recompute: keep the inputs of each sub-layer only and compute it again in the backward pass; a router's choices
            are kept, so that they cannot change.
        parts: set where each process has a part of every sequence; see `distributed.split_sequences`.
    """

    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    recompute = False
    parts: Parts | None = None

    def backbone(
        self,
        tokens: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        record: list[Choice] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, State, tuple[RouterStats, ...]]:
        """Arguments as in `MoEMamba.forward` -> what the head sees (b, l, d), state, router statistics."""
        self._check_input(tokens)
        if tokens.is_floating_point():
            return self.through(tokens, state, seq_idx, record, hidden)
        narrow = tokens.dtype not in (torch.int64, torch.int32)  # uint8, as of bytes or bases
        return self.through(self.embedding(tokens.long() if narrow else tokens), state, seq_idx, record, hidden)

    def through(
        self,
        x: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        record: list[Choice] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, State, tuple[RouterStats, ...]]:
        """As `backbone`, of what the embedding gives, x (b, l, d)."""
        if state is not None:
            self._expect_own(state, x.shape[0])
        x = without_padding(x, seq_idx)  # and so it stays through all layers
        y: Tensor | None = None
        mixers: list[Any] = []
        router: list[RouterStats] = []
        parts = self.parts
        if parts is not None:
            parts.begin(x, seq_idx, state, (parameter.requires_grad for parameter in self.parameters()))
        for number, layer in enumerate(self.layers):
            before = None if state is None else state.mixers[len(mixers) :]
            if parts is not None:
                kinds = [LAYERS[letter] for letter in layer.letters if LAYERS[letter].state_type is not None]  # type: ignore[union-attr]
                before = parts.before(number, layer, before, kinds, x)
            if hidden is not None:
                x, y = x if y is None else x + y, None
                hidden.append(x)
            # torch.func cannot; and what is computed twice would be recorded twice
            if self.recompute and torch.is_grad_enabled() and record is None and not ops.transformed(x):
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
                x, y, after, stats = layer(x, y, before, seq_idx, record)
            if parts is not None:
                y, after = parts.after(number, y, after)
            mixers += after
            router += stats
        if parts is not None:
            router = parts.together(router)
        x = x if y is None else x + y
        if hidden is not None:
            hidden.append(x)
        return self.norm(x), State(tuple(mixers)), tuple(router)

    def _check_input(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"tokens is a {type(tokens).__name__}; expected a tensor (batch, length): torch.tensor([ids])"
            )
        shape, d = tuple(tokens.shape), self.embedding.embedding_dim
        if tokens.is_floating_point() and (tokens.ndim != 3 or shape[2] != d):
            raise ValueError(
                f"tokens is floating point of shape {shape}; expected integers (batch, length), or embedded "
                f"(batch, length, d_model = {d})"
            )
        if not tokens.is_floating_point() and tokens.ndim != 2:
            raise ValueError(f"tokens has shape {shape}; expected (batch, length)")

    def _expect_own(self, state: State, rows: int) -> None:
        kinds = [LAYERS[letter].state_type for layer in self.layers for letter in layer.letters]  # type: ignore[union-attr]
        own = "".join(_SYMBOLS[kind] for kind in kinds if kind is not None)
        given = "".join(_SYMBOLS.get(type(mixer), "?") for mixer in state.mixers)
        if given != own:
            legend = ", ".join(f"{letter} {LETTERS[letter].name}" for letter in sorted(_SYMBOLS.values()))
            raise ValueError(
                f"state is of the mixers {given!r} ({legend}), and this model's are {own!r}; "
                "a state continues the model that it came from"
            )
        if own and state.batch_size != rows:
            raise ValueError(f"state holds {state.batch_size} rows and tokens {rows}; they must be as many")


class MoEMamba(Backbone):
    """A language model of any pattern of `ModelConfig`.

    Forward, chunked prefill, decoding and truncated back-propagation are one call with different lengths.

    `torch.export` takes it with its state. What it makes is loaded where `moemamba.model` is imported, after
    `ops.load_kernels` of the backend whose kernels it calls: "cpu" for a model that was on the CPU.
    """

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            tokens: Tensor,
            state: State | None = None,
            seq_idx: Tensor | None = None,
            targets: None = None,
            record: list[Choice] | None = None,
            hidden: list[Tensor] | None = None,
        ) -> Predicted: ...

        @overload
        def __call__(
            self,
            tokens: Tensor,
            state: State | None = None,
            seq_idx: Tensor | None = None,
            *,
            targets: Tensor,
            record: list[Choice] | None = None,
            hidden: list[Tensor] | None = None,
        ) -> Scored: ...

        @overload
        def __call__(
            self,
            tokens: Tensor,
            state: State | None,
            seq_idx: Tensor | None,
            targets: Tensor,
            record: list[Choice] | None = None,
            hidden: list[Tensor] | None = None,
        ) -> Scored: ...

        def __call__(self, *arguments: Any, **named: Any) -> Output: ...

    def __init__(self, config: ModelConfig):
        super().__init__()
        expect_config(config)
        self.config = config
        self._forgotten = _Forgotten()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Residual(own, letters) for letters, own in config.sublayers())
        self.norm = final_norm(config)
        self.head = Head(config.d_model, config.vocab_size, bias=config.head_bias)
        initialise(self)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        targets: Tensor | None = None,
        record: list[Choice] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Output:
        """Logits for every position, or the loss against targets.

        Args:
            tokens: (b, l) integers; or (b, l, d) floating point, which stands for what the embedding makes of them.
            state: continues the first sequence of each row.
            seq_idx: (b, l) sequence that each position belongs to; -1 is padding, which changes nothing.
            targets: (b, l) int64; -100 does not count.
            record: a list to which each router appends the experts and gates of every token, (b, l, k), as in `router`.
            hidden: a list to which the residual stream is appended before each sub-layer and after the last, (b, l, d).
        Raises:
            ValueError: a shape that does not fit.
        """
        last, state, router = self.backbone(tokens, state, seq_idx, record, hidden)
        wanted = targets is not None or (bool(router) and torch.is_grad_enabled())
        auxiliary = weighed(router, self.config.losses, last) if wanted else None
        if targets is None:
            return Output(self.head(last), state, router, auxiliary=auxiliary)
        if targets.shape != tokens.shape[:2]:
            raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {tuple(tokens.shape[:2])} as tokens")
        loss = self.head(last, targets)
        if self._forgotten.watches(last, self):
            self._forgotten.listen(loss, router)
        return Output(None, state, router, loss, auxiliary)

    def roles(self) -> dict[str, Role]:
        """The role of each parameter; rows of the embedding and the head stand for tokens, one by one."""
        rows = Role(muon=False)
        return composed(self) | {
            "embedding.weight": rows._replace(float32=True, fan_in=1),
            "head.weight": rows._replace(fan_in=self.config.d_model),
        }

    def compile_layers(self, **options: Any) -> None:
        """`torch.compile` each residual sub-layer, in place: names in `state_dict` stay as they are.

        Layers of one letter share one compilation, so that a model of any depth starts as fast as one of its pattern.

        Args:
            options: of `torch.compile`.
        """
        settings = torch._dynamo.config
        settings.optimize_ddp = False  # a layer is one graph, not cut where DistributedDataParallel's buckets end
        kinds = len(set(self.config.sublayers()))
        settings.recompile_limit = max(settings.recompile_limit, 8 * kinds)  # of one function
        for layer in self.layers:
            layer.compile(**options)

    @property
    def router_names(self) -> tuple[str, ...]:
        """Where each router sits, in the order of `Output.router`: "layers.1.branches.0"."""
        return tuple(routers(self))

    def update_balance_bias(self, router: tuple[RouterStats, ...]) -> None:
        """Loss-free balancing: after a step, move each router's selection bias against its load."""
        for (name, module), stats, experts in zip(routers(self).items(), router, self.config.losses, strict=True):
            if not experts.bias_rate:
                continue
            if not hasattr(module, "update_balance_bias"):
                raise ValueError(f"bias_rate is {experts.bias_rate}, but the router of {name} has no bias; set it to 0")
            module.update_balance_bias(stats.load, experts.bias_rate)  # type: ignore[operator]


def foreign_parts(model: MoEMamba) -> dict[str, str]:
    """The modules of a model that moemamba would not build from its configuration: {"layers.1.branches.0.router":
    "mine.HashRouter"}, without those inside of one."""
    with torch.device("meta"):
        expected = {name: type(module) for name, module in MoEMamba(model.config).named_modules()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{part}.") for part in found)
        if type(module) is not expected.get(name) and not inside:
            found[name or "model"] = f"{type(module).__module__}.{type(module).__qualname__}"
    return found


class _Forgotten:
    """Says once that a training loop leaves out `Output.auxiliary`: without it experts soon get no tokens.

    It listens to backward passes until one has reached a router's balance loss, or those of `PATIENCE` steps have not.
    What asks for gradients and changes no router, such as a map of saliency, is no step.
    """

    PATIENCE = 10

    def __init__(self) -> None:
        self.alone, self.silent = 0, False
        self.version: int | None = None
        self.heard = False

    def watches(self, hidden: Tensor, model: MoEMamba) -> bool:
        if self.silent or not hidden.requires_grad or torch.compiler.is_compiling() or ops.transformed(hidden):
            return False
        if not any(experts.balance_weight for experts in model.config.losses):
            self.silent = True
            return False
        version = next((each._version for name, each in model.named_parameters() if ".router." in name), None)
        if version != self.version:
            self.version, self.heard = version, False
        if self.alone < self.PATIENCE:
            return True
        self.silent = True
        warnings.warn(
            "the balance loss of the routers is not in the loss that was minimised, so that experts may get no tokens; "
            "minimise out.loss + out.auxiliary, or set balance_weight and z_weight to 0",
            stacklevel=6,
        )
        return False

    def listen(self, loss: Tensor, router: tuple[RouterStats, ...]) -> None:
        balancing = [stats.balance_loss for stats in router if stats.balance_loss.requires_grad]
        if not balancing or not loss.requires_grad:
            return
        loss.register_hook(self._hear_loss)
        for each in balancing:  # whoever weighs them himself needs no `Output.auxiliary`
            each.register_hook(self._hear_balance)

    def _hear_loss(self, _: Tensor) -> None:
        self.alone += not self.heard
        self.heard = True

    def _hear_balance(self, _: Tensor) -> None:
        self.silent = True


# The first letter with a state of each kind, which stands for it in messages.
_SYMBOLS: dict[type[Any], str] = {
    layer.state_type: letter for letter, layer in reversed(LAYERS.items()) if layer.state_type is not None
}
_ROUTERS = ("moemamba::route_with_totals",)  # by name, since a backend defines its ops when it is first used


def _save_choices(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    chosen = op in (torch.ops.aten.topk.default, torch.ops.aten.argmax.default) or op.name() in _ROUTERS
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


_keep_choices: Callable[[], Any] = partial(create_selective_checkpoint_contexts, _save_choices)

# What a loop of one's own keeps beside its weights, torch.load reads without being told that it is safe.
torch.serialization.add_safe_globals([State, Choice, Output, RouterStats, *STATES.values()])

# torch.export.save writes what a program takes and returns by these names; of its own accord it knows no NamedTuple's.
for _kind in (Output, RouterStats, *STATES.values()):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"moemamba.{_kind.__name__}")
