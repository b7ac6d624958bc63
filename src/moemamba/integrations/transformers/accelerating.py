"""transformers' own Mamba, Falcon-Mamba and Jamba on our kernels, with their weights and their caches."""

from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...layers.plain import plain, weights_alone
from ...ops.mamba_step import Inner

MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")
NORMS = ("MambaRMSNorm", "FalconMambaRMSNorm", "JambaRMSNorm")


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
            module.forward = MethodType(forward, module)

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
        kind = _kind(module)
        if kind in MIXERS:
            _check(name, module)
            found[name] = (module, _Mixer())
            inside.update(module.children())  # whose norms the mixer sees to
        elif kind in NORMS and module not in inside:
            found[name] = (module, _norm)
    if not inside:
        raise ValueError(f"{type(model).__name__} has no layer to accelerate; those of transformers that are: {MIXERS}")
    return Accelerated(found)


def _kind(module: nn.Module) -> str:
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def _check(name: str, mixer: nn.Module) -> None:
    own = mixer.__dict__.get("forward")
    if isinstance(getattr(own, "__func__", None), _Mixer):
        raise ValueError(f"{name} is accelerated already; undo that first")
    if getattr(mixer, "activation", "silu") != "silu":
        raise ValueError(f"{name} has the activation {mixer.activation!r}; the kernels know silu alone")


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm, in the dtype of its input."""
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon).to(hidden_states.dtype)


class _Mixer:
    """The forward of a Mamba layer, and what its steps have in common."""

    def __init__(self) -> None:
        self.places: Any = None
        self.take: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None = None

    def __reduce__(self) -> tuple[type["_Mixer"], tuple[()]]:
        return _Mixer, ()  # a copy of the model has weights of its own

    def __call__(
        self, mixer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """See the forward that it takes the place of, whose cache is called `cache` from 5.24 on."""
        cache = kwargs.pop("cache", cache_params)
        if cache is not None:
            cached = cache.layers[mixer.layer_idx]
            if cached.record_past:  # for a speculation, whose end it takes back
                return type(mixer).forward(mixer, hidden_states, cache, attention_mask, **kwargs)  # type: ignore[no-any-return]
            if hidden_states.shape[1] == 1 and cached.has_previous_state[0] and attention_mask is None:
                y = self.step(mixer, hidden_states, cached)
                if y is not None:
                    return y
        return _whole(mixer, hidden_states, cache, attention_mask, kwargs.get("seq_idx"))

    def step(self, mixer: Any, x: Tensor, cached: Any) -> Tensor | None:
        """One token x (b, 1, d) by one kernel, which overwrites the states of a layer's cache; None where there is no
        kernel. What is made of the weights is made again when they lie elsewhere; the kernel's own function sees
        whether they have changed in place."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        weights = _weights(mixer)
        if weights is None:
            return None
        if ops.choose("mamba_step", x) != "cpu":
            return _copying_step(x, cached, _squeezed(weights))
        tensors = (*weights[:9], *(weights[9][:3] if weights[9] else ()))
        places = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors if t is not None]
        if places != self.places:
            weights = _squeezed(weights)
            fused = ops.fuses_mamba_step(x, *weights)
            self.take = ops.mamba_step_of(weights, mixer.conv_kernel_size) if fused else None
            self.places = places
        take = self.take
        return None if take is None else take(x, _by_channel(cached.conv_states), _by_channel(cached.recurrent_states))


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
    own = _inner_norm(norm)
    return norm(x) if own is None else ops.rms_norm(x, *own).to(x.dtype)  # type: ignore[no-any-return]


def _inner_norm(norm: nn.Module) -> tuple[Tensor | None, float] | None:
    """Weight and epsilon; None where calling it may do more than a norm does."""
    kind = _kind(norm)
    if not plain(norm, type(norm)):
        return None
    if kind == "FalconMambaWeightlessRMSNorm":
        return None, norm.eps  # type: ignore[return-value]
    return (norm.weight, norm.variance_epsilon) if kind == "JambaRMSNorm" else None  # type: ignore[return-value]


def _by_channel(states: dict[int, Tensor]) -> Tensor:
    """The state of a layer's cache, after it has been put into the order in memory that kernels of the CPU read."""
    state = states[0].transpose(1, 2)
    if not state.is_contiguous():
        state = state.contiguous()
        states[0] = state.transpose(1, 2)
    return states[0]


def _copying_step(x: Tensor, cached: Any, weights: tuple[Any, ...]) -> Tensor | None:
    """One token where states are copied between their order in memory and ours."""
    conv, ssm = cached.conv_states[0], cached.recurrent_states[0]
    if ssm.dtype != torch.float32 or not ops.fuses_mamba_step(x, *weights):
        return None
    y, after, ssm_after = ops.mamba_step(x, conv[..., 1:].contiguous(), ssm, *weights)
    conv.copy_(torch.cat([conv[..., 1:2], after], -1))
    ssm.copy_(ssm_after)
    return y


def _weights(mixer: Any) -> tuple[Any, ...] | None:
    """What `ops.mamba_step` reads up to `inner`, but the convolution's weight (i, 1, k); None where calling the mixer's
    children may do more than it does."""
    children, own = mixer._modules, mixer._parameters  # a look-up by attribute costs as much as the question
    in_proj, out_proj = weights_alone(children["in_proj"], nn.Linear, 1), weights_alone(children["out_proj"], nn.Linear, 1)
    x_proj, dt_proj = weights_alone(children["x_proj"], nn.Linear, 1), weights_alone(children["dt_proj"], nn.Linear, 2)
    conv1d, inner = weights_alone(children["conv1d"], nn.Conv1d, 2), None
    if not (in_proj and out_proj and x_proj and dt_proj and conv1d):
        return None
    if "dt_layernorm" in children:
        norms = [_inner_norm(children[f"{name}_layernorm"]) for name in ("dt", "b", "c")]
        if None in norms or len({eps for _, eps in norms}) > 1:  # type: ignore[misc]
            return None
        inner = Inner(*(weight for weight, _ in norms), norms[0][1])  # type: ignore
    return (*in_proj, *conv1d, *x_proj, *dt_proj, own["A_log"], own["D"], *out_proj, inner)


def _squeezed(weights: tuple[Any, ...]) -> tuple[Any, ...]:
    return weights[0], weights[1].squeeze(1), *weights[2:]
