"""One sequence over several processes: each has a part of it, and passes the state on to the next.

A layer's state is all that later tokens know of earlier ones, and gradients flow through it. So a process takes the
state of the part before its own into each sub-layer, and gives the state that is left there to the process of the part
behind; in the backward pass the gradients of these states go the other way. Nothing is computed twice: while one
process is in a sub-layer, the process of the part before is already in the next. What waits is the time of one
sub-layer for each process but the first.

Routers add up: who is dropped for want of capacity depends on how many choices earlier parts made (they are passed on
likewise), and the balance loss on the load of all parts, which is summed once, behind the last sub-layer.
"""

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.packing import boundaries
from .moe.routing import BaseRouter, Open, RouterStats, completed, gathered

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
AXES = 4  # of a tensor of a state, at most
ENTRIES = 2 + AXES  # that a tensor has in a letter's head: dtype, whether it has a gradient, shape
TENSORS = 64  # of the mixers of one sub-layer, at most
KEPT = 64  # kinds of calls of which it is remembered what is sent


class _Form(NamedTuple):
    """What a tensor is that the process before sends."""

    dtype: torch.dtype
    gradient: bool
    shape: tuple[int, ...]


class Parts:
    """The equally long parts of a batch's sequences, one on each process of a group, in the order of its ranks.

    Every process calls the same methods in the same order, forward and backward.

    Args:
        group: its processes, each of which has a part; all processes if None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        group = group or dist.group.WORLD
        if group is None:
            raise ValueError("there are no processes that share sequences; start several with torchrun")
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._known: dict[tuple[int, ...], dict[Any, list[_Form]]] = {}
        self._forms: dict[Any, list[_Form]] = {}  # of this kind of call: what is sent to whom
        self._under_way: list[tuple[dist.Work, Tensor]] = []
        self._continues: Tensor | None = None
        self._tokens: Tensor | None = None
        self._earlier: dict[int, Tensor] = {}
        self._arrived: deque[Tensor] = deque()

    def begin(self, x: Tensor, seq_idx: Tensor | None, state: Any, trained: Iterable[bool] = ()) -> None:
        """At the bottom of the model: whether the first sequence of each row goes on from the part before.

        Args:
            x: (b, l, d), what every process has so much of.
            seq_idx: (b, l) of this part; the same sequence has the same number in every part.
            state: which continues the first sequence of each row: heeded in the first part alone.
            trained: of each parameter, whether it has a gradient.
        Raises:
            ValueError: the processes have unequal parts.
        """
        self.settle()
        self._earlier.clear()
        self._arrived.clear()
        self._continues = self._tokens = None
        rows, length = x.shape[:2]
        own = [rows, length, seq_idx is not None, _digest(x, state, trained)]
        everyone = gathered(torch.tensor(own, device=x.device), self.group).tolist()
        if any(each[:3] != everyone[0][:3] for each in everyone):
            what = [f"{b} rows of {n} tokens, {'with' if s else 'without'} seq_idx" for b, n, s, _ in everyone]
            raise ValueError(f"the parts of a sequence are {' and '.join(what)}; they must be alike, so pad the last")
        key = (*everyone[0][:3], *(each[3] for each in everyone))  # what one sends depends on what all earlier ones got
        self._forms = self._known.setdefault(key, {})
        if len(self._known) > KEPT:  # in the same order on all processes
            del self._known[next(iter(self._known))]
        if seq_idx is None:
            return
        valid, _ = boundaries(seq_idx)
        there, time = valid.any(1), torch.arange(length, device=x.device)
        first = torch.where(valid, time, length).amin(1).clamp(max=max(0, length - 1))
        last = torch.where(valid, time, -1).amax(1).clamp(min=0)
        ids = (seq_idx.gather(1, place[:, None])[:, 0] for place in (first, last))
        parts = gathered(torch.stack([valid.sum(1), there, *ids]).long(), self.group)  # (parts, 4, b)
        self._tokens = parts[:, 0].sum(0)
        before, begun = parts[0, 3], parts[0, 1].bool()
        goes_on = torch.ones_like(begun)
        for part in parts[1 : self.rank + 1]:
            _, has, first_id, last_id = part
            goes_on = ~has.bool() | ~begun | (first_id == before)
            before, begun = torch.where(has.bool(), last_id, before), begun | has.bool()
        self._continues = goes_on

    def tokens(self, own: Tensor, groups: int) -> Tensor:
        """(g,) tokens of each routing group in all parts, of this part's own, padding not counted."""
        return own * self.size if self._tokens is None else self._tokens.view(groups, -1).sum(1).to(own.dtype)

    def earlier(self, router: Any, counts: Tensor) -> Tensor:
        """(g, e) int64 choices of earlier parts, of this part's own counts; a layer that is computed again gets the
        same."""
        known = self._earlier.get(id(router))
        if known is None:
            known = self._arrived.popleft() if self.rank else torch.zeros_like(counts)
            if self.rank + 1 < self.size:
                self._send(self.rank + 1, known + counts)
            self._earlier[id(router)] = known
        return known

    def before(
        self, layer: int, module: nn.Module, states: Sequence[Any] | None, kinds: Sequence[type[Any]], x: Tensor
    ) -> Any:
        """The states that the mixers of a sub-layer begin with: those given in the first part, else those of the
        process before, empty in rows whose first sequence begins here.

        Args:
            layer, module: its number, and the sub-layer, whose routers want to know of earlier choices.
            states: given to the model, beginning with those of these mixers.
            kinds: the layers whose states they are.
        """
        if self.rank == 0:
            return states
        for router in module.modules():  # in the order of their calls, before the states that the layer leaves
            if isinstance(router, BaseRouter) and router.rules.parts is self and router.capacity_factor is not None:
                shape = router.groups, router.n_experts
                self._arrived.append(self._receive(self.rank - 1, x.new_empty(shape, dtype=torch.int64)))
        if not kinds:
            return states
        key, source = ("from", layer), self.rank - 1
        if key not in self._forms:
            self._forms[key] = _read(self._receive(source, x.new_empty(1 + TENSORS * ENTRIES, dtype=torch.int64)))
        forms = self._forms[key]
        anchor = x.new_zeros((), requires_grad=any(form.gradient for form in forms))
        received = iter(_Received.apply(self, forms, anchor))  # type: ignore[no-untyped-call]
        found = []
        for kind in kinds:
            assert kind.state_type is not None
            state = kind.state_type(*(next(received) for _ in kind.state_type._fields))
            found.append(state if self._continues is None else kind.keep(state, self._continues))
        return tuple(found)

    def after(self, layer: int, y: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Give the states that a sub-layer has left to the process behind; y is its output, through which the gradient
        of this process comes."""
        if not states or self.rank + 1 == self.size:
            return y, list(states)
        key, target = ("to", layer), self.rank + 1
        tensors = [tensor for state in states for tensor in state]
        if key not in self._forms:
            self._forms[key] = [_Form(each.dtype, each.requires_grad, tuple(each.shape)) for each in tensors]
            self._send(target, _written(self._forms[key]).to(y.device))
        y, *tensors = _Sent.apply(self, y, *tensors)  # type: ignore[no-untyped-call]
        left = iter(tensors)
        return y, [type(state)(*(next(left) for _ in state)) for state in states]

    def together(self, router: Sequence[RouterStats | Open]) -> list[RouterStats]:
        """The statistics of all parts, of those that routers have left open."""
        still = [stats.load for stats in router if isinstance(stats, Open)]
        if not still:
            return [stats for stats in router if isinstance(stats, RouterStats)]
        loads = torch.cat([load.flatten() for load in still])
        dist.all_reduce(loads, group=self.group)
        each = iter(loads.split([load.numel() for load in still]))
        return [
            completed(stats, next(each).view_as(stats.load)) if isinstance(stats, Open) else stats for stats in router
        ]

    def settle(self) -> None:
        """Wait for what was sent."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def _send(self, part: int, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._process(part), group=self.group)
        if work is not None:
            self._under_way.append((work, tensor))

    def _receive(self, part: int, like: Tensor) -> Tensor:
        tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(tensor, self._process(part), group=self.group)
        return tensor

    def _process(self, part: int) -> int:
        return dist.get_global_rank(self.group, part)


def _digest(x: Tensor, state: Any, trained: Iterable[bool]) -> int:
    """Of what the forms of the states of a call depend on besides its size."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    tensors = [] if state is None else [tensor for mixer in state.mixers for tensor in mixer]
    given = [(tensor.dtype, tuple(tensor.shape), tensor.requires_grad) for tensor in tensors]
    own = (x.dtype, x.requires_grad, torch.is_grad_enabled(), autocast, state is None, given, list(trained))
    return zlib.crc32(repr(own).encode())


def _written(forms: Sequence[_Form]) -> Tensor:
    """Forms as one tensor of integers."""
    assert len(forms) <= TENSORS, "a sub-layer with more tensors of state than a letter's head has room for"
    flat = [len(forms)]
    for dtype, gradient, shape in forms:
        flat += [DTYPES.index(dtype), gradient, *(-1,) * (AXES - len(shape)), *shape]
    return torch.tensor(flat + [0] * (1 + TENSORS * ENTRIES - len(flat)))


def _read(written: Tensor) -> list[_Form]:
    count, *flat = written.tolist()
    each = (flat[place * ENTRIES : (place + 1) * ENTRIES] for place in range(count))
    return [_Form(DTYPES[dtype], bool(gradient), tuple(n for n in shape if n >= 0)) for dtype, gradient, *shape in each]


class _Received(torch.autograd.Function):
    """The states of the part before; their gradients go back there."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, forms: list[_Form], anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.parts, ctx.forms = parts, forms
        tensors = []
        for dtype, _, shape in forms:
            tensors.append(parts._receive(parts.rank - 1, anchor.new_empty(shape, dtype=dtype)))
        ctx.mark_non_differentiable(*(tensor for tensor, form in zip(tensors, forms, strict=True) if not form.gradient))
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        for gradient, form in zip(gradients, ctx.forms, strict=True):
            if form.gradient:
                ctx.parts._send(ctx.parts.rank - 1, gradient.to(form.dtype))
        return None, None, None


class _Sent(torch.autograd.Function):
    """States go to the part behind; what it makes of them adds to their gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.parts, ctx.wanted = parts, ctx.needs_input_grad[2:]
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        for tensor in tensors:
            parts._send(parts.rank + 1, tensor.detach())
        views = [tensor.view_as(tensor) for tensor in tensors]
        ctx.mark_non_differentiable(*(view for view, wants in zip(views, ctx.wanted, strict=True) if not wants))
        return y.view_as(y), *views

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        for own, wants, (shape, dtype) in zip(gradients, ctx.wanted, ctx.like, strict=True):
            if not wants:
                found.append(None)
                continue
            theirs = ctx.parts._receive(ctx.parts.rank + 1, dy.new_empty(shape, dtype=dtype))
            found.append(theirs if own is None else own + theirs)
        return None, dy, *found
