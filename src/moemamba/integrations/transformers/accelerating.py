"""transformers' own Mamba, Falcon-Mamba and Jamba on our kernels, with their weights and their caches."""

from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...layers.plain import weights_alone

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
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind in MIXERS:
            _check(name, module)
            found[name] = (module, _mixer)
        elif kind in NORMS:
            found[name] = (module, _norm)
    if not any(forward is _mixer for _, forward in found.values()):
        raise ValueError(f"{type(model).__name__} has no layer to accelerate; those of transformers that are: {MIXERS}")
    return Accelerated(found)


def _kind(module: nn.Module) -> str:
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def _check(name: str, mixer: nn.Module) -> None:
    own = mixer.__dict__.get("forward")
    if getattr(own, "__func__", None) is _mixer:
        raise ValueError(f"{name} is accelerated already; undo that first")
    if getattr(mixer, "activation", "silu") != "silu":
        raise ValueError(f"{name} has the activation {mixer.activation!r}; the kernels know silu alone")


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm, in the dtype of its input."""
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon).to(hidden_states.dtype)


def _mixer(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """A Mamba layer; see the forward that it takes the place of, whose cache is called `cache` from 5.24 on."""
    cache_params = kwargs.pop("cache", cache_params)
    conv = ssm = None
    if cache_params is not None:
        own = cache_params.layers[self.layer_idx]
        if own.record_past:  # for a speculation, whose end it takes back
            return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)  # type: ignore[no-any-return]
        if own.has_previous_state[0]:
            conv, ssm = own.conv_states[0], own.recurrent_states[0]
    x = _unpadded(hidden_states, attention_mask)
    if conv is not None and ssm is not None and x.shape[1] == 1:
        y = _step(self, x, conv, ssm)
        if y is not None:
            return y
    seq_idx = kwargs.get("seq_idx")
    u, z = self.in_proj(x).chunk(2, dim=-1)
    if cache_params is not None:
        before = None if conv is None else conv[..., 1:].clone()  # theirs holds a position more
        cache_params.update_conv_state(u.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    else:
        before = None
    taps, shift = self.conv1d.weight.squeeze(1), self.conv1d.bias
    u, _ = ops.causal_conv1d(u, taps, shift, initial_state=before, seq_idx=seq_idx)
    u = _unpadded(u, attention_mask)
    dt, B, C = _chosen(self, u)
    A, D = -torch.exp(self.A_log.float()), self.D.float()
    bias = None if self.dt_proj.bias is None else self.dt_proj.bias.float()
    dt = F.linear(dt, self.dt_proj.weight)
    initial = None if ssm is None else ssm.float()
    y, after = ops.selective_scan(u, dt, A, B, C, D, z, bias, initial_state=initial, seq_idx=seq_idx)
    if cache_params is not None:
        cache_params.update_recurrent_state(after, self.layer_idx)
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
    """Jamba's norms have weights, and are accelerated by themselves; Falcon-Mamba's do nothing with theirs."""
    if _kind(norm) == "FalconMambaWeightlessRMSNorm":
        return ops.rms_norm(x, None, norm.eps).to(x.dtype)
    return norm(x)  # type: ignore[no-any-return]


def _step(self: Any, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor | None:
    """One token by one kernel, where there is one for these weights; the states are overwritten."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or hasattr(self, "dt_layernorm"):
        return None
    in_proj, out_proj = weights_alone(self.in_proj, nn.Linear, 1), weights_alone(self.out_proj, nn.Linear, 1)
    x_proj, dt_proj = weights_alone(self.x_proj, nn.Linear, 1), weights_alone(self.dt_proj, nn.Linear, 2)
    conv1d = weights_alone(self.conv1d, nn.Conv1d, 2)
    if not (in_proj and out_proj and x_proj and dt_proj and conv1d) or ssm.dtype != torch.float32:
        return None
    assert isinstance(conv1d[0], Tensor)
    inside = (conv1d[0].squeeze(1), conv1d[1], *x_proj, *dt_proj, self.A_log, self.D)
    weights = (*in_proj, *inside, *out_proj)
    if not ops.fuses_mamba_step(x, *weights):
        return None
    y, after, ssm_after = ops.mamba_step(x, conv[..., 1:].contiguous(), ssm, *weights)
    conv.copy_(torch.cat([conv[..., 1:2], after], -1))
    ssm.copy_(ssm_after)
    return y
