"""One token of transformers' own Mamba layers by one kernel, on their weights and their caches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...layers.plain import plain, weights_alone
from ...ops.mamba_step import Inner


class Step:
    """A token through a layer, with all that its weights say looked up once.

    It is looked up again when they lie elsewhere; that they have changed in place is seen by the kernel's own function.
    """

    def __init__(self) -> None:
        self.made: tuple[Any, Callable[[Tensor, Tensor, Tensor], Tensor | None] | None] = (None, None)

    def __reduce__(self) -> tuple[type["Step"], tuple[()]]:
        return Step, ()  # a copy of a model has weights of its own

    def __call__(self, mixer: Any, norm: Any, x: Tensor, cache: Any) -> Tensor | None:
        """What a mixer makes of x (b, l, d), or with its norm `x + mixer(norm(x))`.

        Returns:
            (b, 1, d), and the states of the cache are overwritten; None, and nothing has happened, where this is not a
            token after others, without gradients, for which there is a kernel.
        """
        cached = cache.layers[mixer.layer_idx]
        if x.shape[1] != 1 or not cached.has_previous_state[0] or cached.record_past:
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        weights = _weights(mixer)
        if weights is None:
            return None
        if ops.choose("mamba_step", x) != "cpu":
            return _copying(x, cached, _squeezed(weights)) if norm is None else None
        normed = (norm._parameters["weight"], norm.variance_epsilon) if norm else None
        inner, outer = weights[9] or (), normed or ()
        tensors = (*weights[:9], *inner[:3], *outer[:1])
        places: list[Any] = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors if t is not None]
        places += (*inner[3:], *outer[1:])
        made, take = self.made
        if places != made:
            weights, take = _squeezed(weights), None
            if ops.fuses_mamba_step(x, *weights):
                take = ops.mamba_step_of(weights, mixer.conv_kernel_size, normed)
            self.made = places, take
        return None if take is None else take(x, _by_channel(cached.conv_states), _by_channel(cached.recurrent_states))


def their_kind(module: nn.Module) -> str:
    """The name of a class of transformers; nothing for one of somebody else."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def inner_norm(norm: Any) -> tuple[Tensor | None, float] | None:
    """Weight and epsilon of a norm of dt, B or C; None where calling it may do more than a norm does."""
    kind = their_kind(norm)
    if not plain(norm, type(norm)):
        return None
    if kind == "FalconMambaWeightlessRMSNorm":
        return None, norm.eps
    return (norm.weight, norm.variance_epsilon) if kind == "JambaRMSNorm" else None


def _weights(mixer: Any) -> tuple[Any, ...] | None:
    """What `ops.mamba_step` reads up to `inner`, but the convolution's weight as (i, 1, k); None where calling the
    mixer's children may do more than it does."""
    children, own = mixer._modules, mixer._parameters  # a look-up by attribute costs as much as the question
    in_proj = weights_alone(children["in_proj"], nn.Linear, 1)
    conv1d = weights_alone(children["conv1d"], nn.Conv1d, 2)
    x_proj = weights_alone(children["x_proj"], nn.Linear, 1)
    dt_proj = weights_alone(children["dt_proj"], nn.Linear, 2)
    out_proj = weights_alone(children["out_proj"], nn.Linear, 1)
    if not (in_proj and conv1d and x_proj and dt_proj and out_proj):
        return None
    inner = None
    if "dt_layernorm" in children:
        norms = [inner_norm(children[f"{name}_layernorm"]) for name in ("dt", "b", "c")]
        known = [norm for norm in norms if norm is not None]
        if len(known) < 3 or len({eps for _, eps in known}) > 1:
            return None
        inner = Inner._make((*(weight for weight, _ in known), known[0][1]))
    return (*in_proj, *conv1d, *x_proj, *dt_proj, own["A_log"], own["D"], *out_proj, inner)


def _squeezed(weights: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the convolution's weight as (i, k)."""
    return weights[0], weights[1].squeeze(1), *weights[2:]


def _by_channel(states: dict[int, Tensor]) -> Tensor:
    """The state of a layer's cache with channels last, as it lies in memory from now on."""
    state = states[0].transpose(1, 2)
    if not state.is_contiguous():
        state = state.contiguous()
        states[0] = state.transpose(1, 2)
    return state


def _copying(x: Tensor, cached: Any, weights: tuple[Any, ...]) -> Tensor | None:
    """The same where states are copied between their order in memory and ours."""
    conv, ssm = cached.conv_states[0], cached.recurrent_states[0]
    if ssm.dtype != torch.float32 or not ops.fuses_mamba_step(x, *weights):
        return None
    y, after, ssm_after = ops.mamba_step(x, conv[..., 1:].contiguous(), ssm, *weights)
    conv.copy_(torch.cat([conv[..., 1:2], after], -1))
    ssm.copy_(ssm_after)
    return y
