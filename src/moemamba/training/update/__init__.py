"""One step of the optimiser: loss, schedule, update, and the guard that withholds it."""

from .average import Average
from .guard import Diverged, Failed, Fatal, Guard, Skips
from .optim import load_optimizer_tensors, make_optimizer, optimizer_of, optimizer_tensors
from .schedule import becomes, fall, learning_rate, warmup_steps
from .step import Step, captures

__all__ = [
    "Average",
    "Diverged",
    "Failed",
    "Fatal",
    "Guard",
    "Skips",
    "Step",
    "becomes",
    "captures",
    "fall",
    "learning_rate",
    "load_optimizer_tensors",
    "make_optimizer",
    "optimizer_of",
    "optimizer_tensors",
    "warmup_steps",
]
