"""transformers' own Mamba, Falcon-Mamba and Jamba on our kernels, with their weights and their caches."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...layers.plain import unhooked
from .stepping import Step, inner_norm, their_kind

MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")
NORMS = ("MambaRMSNorm", "FalconMambaRMSNorm", "JambaRMSNorm")
BLOCKS = ("MambaBlock", "FalconMambaBlock")


class Accelerated:
    """What `accelerate` has changed in a model. `undo()`, or leaving it as a context, makes the model what it was.

    Attributes:
        names: of the modules that compute on our kernels.
    """

    def __init__(self, modules: dict[str, tuple[nn.Module, Callable[..., Any]]]):
        self.names = tuple(modules)
        self._before: list[tuple[nn.Module, Any]] = []
        for module, forward in modules.values():
            self._before.append((module, module.__dict__.get("forward")))
            module.forward = partial(forward, module)

    def undo(self) -> None:
        """The model as it was; a second call does nothing."""
        while self._before:
            module, own = self._before.pop()
            del module.forward
            if own is not None:
                module.forward = own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate(model: nn.Module) -> Accelerated:
    """Let the Mamba layers and norms of a transformers model compute on our kernels, in place, on CPU and GPU.

    Outputs, gradients and caches are the same, but for two things that transformers' own code gets wrong: a cached
    call of more than one token continues the sequence, and `seq_idx` keeps packed sequences apart.

        accelerated = accelerate(AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf"))
        ...
        accelerated.undo()

    Raises:
        ValueError: the model has none of these layers, or one that is not as they come; it is left as it is.
    """
    found: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        kind = their_kind(module)
        if kind in BLOCKS:
            found[name] = (module, _Block())
        elif kind in MIXERS:
            _check(name, module)
            found[name] = (module, _Mixer())
            inside.update(module.children())  # whose norms the mixer sees to
        elif kind in NORMS and module not in inside:
            found[name] = (module, _norm)
    if not inside:
        raise ValueError(f"{type(model).__name__} has no layer to accelerate; those of transformers that are: {MIXERS}")
    return Accelerated(found)


def _check(name: str, mixer: nn.Module) -> None:
    if isinstance(getattr(mixer.__dict__.get("forward"), "func", None), _Mixer):
        raise ValueError(f"{name} is accelerated already; undo that first")
    if getattr(mixer, "activation", "silu") != "silu":
        raise ValueError(f"{name} has the activation {mixer.activation!r}; the kernels know silu alone")


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm, in the dtype of its input."""
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon).to(hidden_states.dtype)


class _Mixer:
    """The forward of a Mamba layer."""

    def __init__(self) -> None:
        self.step = Step()

    def __call__(
        self, mixer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """See the forward that it takes the place of, whose cache is called `cache` from 5.24 on."""
        cache = kwargs.pop("cache", cache_params)
        if cache is not None:
            if cache.layers[mixer.layer_idx].record_past:  # for a speculation, whose end it takes back
                return type(mixer).forward(mixer, hidden_states, cache, attention_mask, **kwargs)  # type: ignore[no-any-return]
            y = self.step(mixer, None, hidden_states, cache) if attention_mask is None else None
            if y is not None:
                return y
        return _whole(mixer, hidden_states, cache, attention_mask, kwargs.get("seq_idx"))


class _Block:
    """The forward of a Mamba layer with its norm and what it is added to; but for a token it is theirs."""

    def __init__(self) -> None:
        self.step = Step()

    def __call__(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = kwargs.get("cache", kwargs.get("cache_params"))
        if cache is not None and kwargs.get("attention_mask") is None and not args:
            norm, mixer = block._modules["norm"], block._modules["mixer"]
            if _is_ours(norm, _norm) and _is_ours(mixer, _Mixer):
                y = self.step(mixer, norm, hidden_states, cache)
                if y is not None:
                    return y
        return type(block).forward(block, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]


def _is_ours(module: nn.Module, forward: Any) -> bool:
    """Whether calling a module is calling this forward, or one of this class."""
    own = getattr(module.__dict__.get("forward"), "func", None)
    return (own is forward or type(own) is forward) and unhooked(module)


def _whole(self: Any, x: Tensor, cache: Any, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Any number of positions x (b, l, d) of a Mamba layer, after those in a cache."""
    conv = ssm = None
    if cache is not None:
        cached = cache.layers[self.layer_idx]
        if cached.has_previous_state[0]:
            conv, ssm = cached.conv_states[0], cached.recurrent_states[0]
    x = _unpadded(x, attention_mask)
    u, z = self.in_proj(x).chunk(2, dim=-1)
    before = None
    if cache is not None:
        before = None if conv is None else conv[..., 1:].clone()  # theirs holds a position more
        cache.update_conv_state(u.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    taps, shift = self.conv1d.weight.squeeze(1), self.conv1d.bias
    u, _ = ops.causal_conv1d(u, taps, shift, initial_state=before, seq_idx=seq_idx)
    u = _unpadded(u, attention_mask)
    dt, B, C = _chosen(self, u)
    A, D = -torch.exp(self.A_log.float()), self.D.float()
    bias = None if self.dt_proj.bias is None else self.dt_proj.bias.float()
    dt = F.linear(dt, self.dt_proj.weight)
    initial = None if ssm is None else ssm.float()
    y, after = ops.selective_scan(u, dt, A, B, C, D, z, bias, initial_state=initial, seq_idx=seq_idx)
    if cache is not None:
        cache.update_recurrent_state(after, self.layer_idx)
    return self.out_proj(y)  # type: ignore[no-any-return]


def _unpadded(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    return x if attention_mask is None else (x * attention_mask[:, :, None]).to(x.dtype)


def _chosen(self: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt before its projection, B and C, of u (b, l, i)."""
    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    dt, B, C = self.x_proj(u).split(sizes, dim=-1)
    if not hasattr(self, "dt_layernorm"):
        return dt, B, C
    return _inner(self.dt_layernorm, dt), _inner(self.b_layernorm, B), _inner(self.c_layernorm, C)


def _inner(norm: Any, x: Tensor) -> Tensor:
    """Jamba's norms of dt, B and C have weights, Falcon-Mamba's none."""
    own = inner_norm(norm)
    return norm(x) if own is None else ops.rms_norm(x, *own).to(x.dtype)  # type: ignore[no-any-return]
