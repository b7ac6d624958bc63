"""What ops cost in floating-point operations, a multiply-add being two: for torch's FlopCounterMode.

Backward passes count twice what forward passes do, as those of matrix products.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]
"""an op's arguments by name, tensors as their shapes"""


def _scan(given: Given) -> int:
    """Decay, drive, update and output of each state dimension of each channel."""
    return int(9 * math.prod(given["u"]) * given["A"][1])


def _convolution(given: Given) -> int:
    return int(2 * math.prod(given["x"]) * given["weight"][-1])


def _grouped(given: Given) -> int:
    """Rows that are sorted by expert."""
    rows = given.get("x", given.get("dy"))
    assert rows is not None
    return int(2 * rows[0] * math.prod(given["weight"][1:]))


def _expert_linear(given: Given) -> int:
    return int(2 * math.prod(given["indices"]) * math.prod(given["weight"][1:]))


def _expert_feedforward(given: Given) -> int:
    return int(2 * math.prod(given["indices"]) * (math.prod(given["up"][1:]) + math.prod(given["down"][1:])))


def _head(given: Given) -> int:
    """Its gradients are made with the loss."""
    return int((6 if given["gradients"] else 2) * math.prod(given["hidden"]) * given["weight"][0])


def _linear(given: Given) -> int:
    return int(2 * math.prod(given["x"]) * given["weight"][0])


def _product(given: Given) -> int:
    return int(2 * math.prod(given["dy"]) * given["weight"][1])


FORWARD: dict[str, Callable[[Given], int]] = {
    "add_product": _product,
    "causal_conv1d": _convolution,
    "cpu_causal_conv1d": _convolution,
    "cpu_grouped_linear": _grouped,
    "cpu_linear_cross_entropy": _head,
    "cpu_selective_scan": _scan,
    "expert_feedforward": _expert_feedforward,
    "expert_linear": _expert_linear,
    "linear_cross_entropy": _head,
    "linear_float32": _linear,
    "route_with_totals": _linear,
    "selective_scan": _scan,
    "selective_scan_cuda": _scan,
}
"""by the op's name; other ops make no products"""


def formula(name: str, parameters: list[str]) -> Callable[..., int] | None:
    """What torch's counter calls for an op with the shapes of its arguments; None for one that counts nothing."""
    count = FORWARD.get(name.removesuffix("_backward"))
    if count is None:
        return None
    times = 2 if name.endswith("_backward") else 1

    def counted(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
        return times * count(dict(zip(parameters, shapes, strict=False)) | named)

    return counted
