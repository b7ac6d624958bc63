"""What a kernel needs to be an op of PyTorch, written once: custom op, fake, eager bypass, and the gradient of a pair.

    @op("twice", fake=lambda x: torch.empty_like(x))
    def forward(x: Tensor) -> Tensor: ...

    @gradient(forward, outputs="y", of="x")
    def backward(dy: Tensor, x: Tensor) -> list[Tensor]: ...

A plain call skips the dispatcher, whose overhead would be most of the time of generating a token.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from ..arguments import gradients_like
from ..flops import formula

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Op(Protocol[P, R]):
    """A function that torch.compile, torch.export and autograd see as one op, `moemamba::<name>`."""

    name: str
    custom: Any  # what `torch.library.custom_op` made of it

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def wants_grad(*arguments: Any) -> bool:
    """Whether gradients are to flow to one of these, of which some are tensors."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def traced(*arguments: Any) -> bool:
    """Whether a call has to go through the dispatcher, where autograd and torch.compile see it.

    What traces without saying so (AOTAutograd, in backward passes too) hands in subclasses of Tensor, the first
    argument among them.
    """
    if type(arguments[0]) is not Tensor or is_compiling() or watched():
        return True
    return torch.is_grad_enabled() and wants_grad(*arguments)


def watched() -> bool:
    """Whether somebody watches what is dispatched, such as torch's FlopCounterMode."""
    return torch._C._len_torch_dispatch_stack() > 0


def op(name: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function of tensors and numbers the op `moemamba::<name>`; a plain call of it stays one.

    Its annotations are the op's schema, it changes none of its arguments, and what it returns is none of them. Its
    first argument is a tensor. `fake` takes the same arguments and returns room like what the function returns.
    """

    def declare(function: Callable[P, R]) -> Op[P, R]:
        custom = torch.library.custom_op(f"moemamba::{name}", function, mutates_args=())
        custom.register_fake(fake)
        if count := formula(name, list(_parameters(function))):
            register_flop_formula(getattr(torch.ops.moemamba, name))(count)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return custom(*args) if traced(*args) else function(*args)  # type: ignore[call-arg]

        made = cast(Op[P, R], call)
        made.name, made.custom = name, custom
        return made

    return declare


def gradient(
    forward: Op[..., Any], outputs: str, of: str, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[P, list[Tensor]]], Op[P, list[Tensor]]]:
    """Make a function the op `moemamba::<forward's name>_backward`, and what autograd calls for `forward`.

    The function's parameters say what is kept for it, by name: an input of `forward`, one of its outputs, or `dy`,
    the gradient of an output y, None where there is none (and if all are None, the function is not called). What no
    parameter asks for the gradient of is not differentiable.

    Args:
        forward: an op.
        outputs: names for what it returns: "y, state".
        of: the inputs that the function returns gradients of, in order: "x, weight"; see `where_given`.
        fake: if not like these inputs, which the function then is given.
    """
    arguments, results, wanted = list(_parameters(forward)), outputs.split(", "), of.split(", ")

    def declare(function: Callable[P, list[Tensor]]) -> Op[P, list[Tensor]]:
        parameters = list(_parameters(function))
        incoming = {f"d{name}" for name in results} - {*arguments, *results}
        tensors = {*results, *(name for name, kind in _parameters(forward).items() if kind in (Tensor, Tensor | None))}
        kept = [name for name in parameters if name in tensors]
        told = [name for name in parameters if name not in tensors and name not in incoming]
        constant = [k for k, name in enumerate(results) if f"d{name}" not in parameters]

        def like_inputs(*args: Any) -> list[Tensor]:
            given = dict(zip(parameters, args, strict=True))
            return gradients_like(*(given[name] for name in wanted))

        backward: Op[..., list[Tensor]] = op(f"{forward.name}_backward", fake or like_inputs)(function)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            made = output if isinstance(output, tuple) else (output,)
            values = dict(zip(arguments, inputs, strict=True)) | dict(zip(results, made, strict=True))
            ctx.save_for_backward(*(values[name] for name in kept))
            ctx.told = {name: values[name] for name in told}
            ctx.present = [name for name in wanted if values[name] is not None]
            ctx.mark_non_differentiable(*(made[k] for k in constant))
            ctx.set_materialize_grads(False)

        def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(grad is None for grad in grads):
                return (None,) * len(arguments)
            values = {f"d{name}": grad for name, grad in zip(results, grads, strict=True)}
            values |= ctx.told | dict(zip(kept, ctx.saved_tensors, strict=True))
            found = dict(zip(wanted, backward(*[values[name] for name in parameters]), strict=True))
            return tuple(found[name] if name in ctx.present else None for name in arguments)

        forward.custom.register_autograd(differentiate, setup_context=keep)
        return cast(Op[P, list[Tensor]], backward)

    return declare


def where_given(inputs: Sequence[Tensor | None], *gradients: Tensor | None) -> list[Tensor]:
    """The gradients of the inputs that there are, and something empty in the place of the others."""
    like = next(g for g in gradients if g is not None)
    return [like.new_empty(0) if x is None or g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
