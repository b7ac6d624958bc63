"""The ops of one backend as tests call them, past the choice: `Backend("cpu").selective_scan(...)`."""

from moemamba.ops.choice import implementation


class Backend:
    """Arguments are those that faces hand on: all of them, in order."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, op):
        return implementation(op, self.name)


reference, cpu, triton = map(Backend, ("reference", "cpu", "triton"))
