"""One optimiser step, and on one GPU its replay as a CUDA graph: the host launches it whole, not kernel by kernel,
which for small models took most of the time."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ...data.batches import Batch
from ...distributed import (
    Agreement,
    Processes,
    divide_gradients,
    gradient_norm,
    last_part,
    sharded,
    splitting,
    summing,
)
from ...layers.parts import Parts
from ...model import MoEMamba, Output
from ...state import State
from ..config import TrainConfig
from ..evaluate import mixed_precision
from ..watch import Measures, add, measures, router_stats
from .average import Average
from .carry import Carried
from .guard import Guard, apply

WARM_UP = 3  # steps before the capture: kernels are compiled and tuned, the optimiser's state comes to be
AHEAD = 2  # steps that the host may submit before the first of them is done

Taken = tuple[Measures, Tensor, Tensor]
"""of a step: the measures of all processes' batches, the gradient's norm before clipping, whether it failed"""


def losses(output: Output) -> tuple[Tensor, Tensor]:
    """What is minimised, in its parts: the model's loss, and the routers' weighed ones."""
    assert output.loss is not None and output.auxiliary is not None, "the model was called without targets"
    return output.loss, output.auxiliary


def captures(config: TrainConfig, processes: Processes) -> bool:
    """Whether steps are to replay a CUDA graph.

    Raises:
        ValueError: they cannot, but `cuda_graph` asks for it.
    """
    able = processes.device.type == "cuda" and not processes.distributed
    if config.cuda_graph == "on" and not able:
        where = "several processes train" if processes.distributed else f"the device is {processes.device}"
        raise ValueError(f'cuda_graph is "on", but {where}; it needs one GPU and one process: leave it at "auto"')
    return able and config.cuda_graph != "off"


class Step:
    """`step(number, batch, rate)`: forward, backward, clipping and the update, which is withheld if the step fails.

    With `captures` the first steps run kernel by kernel, the next is captured, and from then on it is replayed: the
    same kernels on the same memory, and so the same bits. What it reads besides parameters and state (batch, learning
    rate) is copied to where the graph expects it, and what it returns is overwritten by the next call. Between steps
    parameters may be read at will; whoever puts other tensors in their place must make a new Step.

    Args:
        model, optimizer: on the device; a checkpoint, if there is one, is loaded already.
        dtype: of the activations.
        notify: told why, if the step cannot be captured; the run then goes on kernel by kernel.
        agreement: what several processes tell each other with the sum of a step.
        average: of the weights, which takes in each step.
        sequence: the processes that share each sequence.
    """

    def __init__(
        self,
        model: MoEMamba,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        dtype: torch.dtype,
        guard: Guard,
        processes: Processes,
        notify: Callable[[str], None] = print,
        agreement: Agreement | None = None,
        average: Average | None = None,
        sequence: Parts | None = None,
    ):
        self.model, self.optimizer, self.config, self.dtype = model, optimizer, config, dtype
        self.guard, self.processes, self.notify = guard, processes, notify
        self.agreement, self.average = agreement, average
        self.carried = Carried() if config.carry_state else None
        self.sequence = sequence
        self.forward = summing(model, processes)
        self.captures = captures(config, processes)
        device = processes.device
        self._rates: dict[float, Tensor] = {}
        if device.type == "cuda" and not processes.distributed:
            # On the device also where nothing is captured: float32 rounds it, and so both compute the same.
            self._rates = {group["factor"]: torch.zeros((), device=device) for group in optimizer.param_groups}
            for group in optimizer.param_groups:
                group["lr"] = self._rates[group["factor"]]
        # Gradients are summed on the stream that first made them, which must be the one that is captured.
        self._stream = torch.cuda.Stream(device) if self.captures else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Batch] = []
        self._outputs: Taken | None = None
        self._submitted: deque[torch.cuda.Event] = deque()
        self._taken = 0

    def __call__(self, number: int, batch: list[Batch], rate: float) -> Taken:
        """Take step `number` with the parts of its batch, each as large as those of every other step.

        Raises:
            RuntimeError: the step cannot be captured, and `cuda_graph` asks for it.
        """
        self._set(rate)
        if self.captures and self._taken == WARM_UP:
            self._capture(batch)
        self._taken += 1
        if self._graph is not None:
            taken = self._replay(self._graph, batch)
        elif self._stream is not None:
            taken = self._beside(self._stream, batch)
        else:
            taken = self._compute([part.to(self.processes.device) for part in batch])
        total, norm, failed = taken
        self.guard.note(number, total[0] + total[1], norm, failed)
        if self.average is not None:
            self.average.update(number)  # behind the graph, since how much it takes in depends on the step
        return taken

    def _set(self, rate: float) -> None:
        for factor, place in self._rates.items():
            place.fill_(rate * factor)
        if not self._rates:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]

    def _compute(self, batch: list[Batch]) -> Taken:
        """The step itself; on GPUs without the host waiting for anything."""
        model, config, processes = self.model, self.config, self.processes
        total: Measures = []
        states: list[State] = []
        parts = len(batch) * processes.size
        counted = torch.stack([(part.targets != -100).sum() for part in batch]).to(torch.float32)
        (everywhere,) = processes.sum([counted.sum()])
        shares = counted / everywhere  # of all positions that count
        for number, part in enumerate(batch):
            with last_part(self.forward, number == len(batch) - 1), splitting(model, self.sequence):
                with mixed_precision(processes.device, self.dtype):
                    state = None
                    if self.carried is not None and part.goes_on is not None:
                        state = self.carried.before(number, part.goes_on)
                    output = self.forward(part.tokens, state=state, seq_idx=part.seq_idx, targets=part.targets)
                language, auxiliary = losses(output)
                (language * shares[number] + auxiliary / parts).backward()
            if self.carried is not None:
                states.append(output.state.detach())
            total = add(total, measures(language * shares[number] * parts, auxiliary, output.router))
        told = self.agreement.flags() if self.agreement else []
        total = processes.sum([*torch._foreach_div(total, parts), *told])
        if self.agreement and told:
            self.agreement.hear(total.pop())
        norm = gradient_norm(model.parameters(), processes)
        failed = self.guard.check(total[0] + total[1], norm)
        if self.carried is not None:
            self.carried.keep(states, failed)
        excess = (norm / config.clip).clamp(min=1.0)  # which the update divides the gradient by
        if not sharded(model):
            apply(self.optimizer, failed, excess)
        elif config.on_failure == "stop" or not failed:
            divide_gradients(model.parameters(), excess)  # DTensors' updates take neither it nor a flag
            self.optimizer.step()  # what stops a run is not saved
        self.optimizer.zero_grad()
        # A load of 0 everywhere leaves the biases where they are.
        model.update_balance_bias(router_stats(list(torch._foreach_mul(total, (~failed).to(total[0].dtype)))))
        return total, norm, failed

    def _beside(self, stream: torch.cuda.Stream, batch: list[Batch]) -> Taken:
        current = torch.cuda.current_stream(self.processes.device)
        parts = [part.to(self.processes.device) for part in batch]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            taken = self._compute(parts)
        current.wait_stream(stream)
        return taken

    def _capture(self, batch: list[Batch]) -> None:
        """Record the step, of which nothing is computed yet."""
        self._inputs = [part.like(self.processes.device) for part in batch]
        graph = torch.cuda.CUDAGraph()
        self._capturable(True)
        try:
            # Again the stream, since a capture that fails does not leave it. Other threads may use CUDA meanwhile.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._outputs = self._compute(self._inputs)
            self._graph = graph
        except RuntimeError as error:
            if self.config.cuda_graph == "on":
                raise
            self.captures, self._stream = False, None
            self.notify(f"a step cannot be a CUDA graph, so that it runs kernel by kernel: {_first(error)}")
        finally:
            self._capturable(False)
        self.optimizer.zero_grad()

    def _replay(self, graph: torch.cuda.CUDAGraph, batch: list[Batch]) -> Taken:
        assert self._outputs is not None
        if len(self._submitted) == AHEAD:
            self._submitted.popleft().synchronize()
        for place, part in zip(self._inputs, batch, strict=True):
            place.fill(part)
        graph.replay()
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self.processes.device))
        self._submitted.append(done)
        return self._outputs

    def _capturable(self, value: bool) -> None:
        """AdamW asks for this flag while it is captured, and warns of it at any other time."""
        for group in self.optimizer.param_groups:
            group["capturable"] = value


def _first(error: BaseException) -> str:
    """What went wrong first: the end of a capture that failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
