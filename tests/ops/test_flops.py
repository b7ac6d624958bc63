"""torch's counter of operations knows our ops: a model's are those that `counting` says."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moemamba as mm
from moemamba import ops
from moemamba.counting import flops_per_token
from moemamba.ops.flops import FORWARD, formula

# Ops that make no products, or so few of them that nobody counts.
NOTHING = {"cpu_rms_norm", "places_in_queues"}


def test_every_op_is_counted_or_makes_no_products():
    """A new op needs a line in `ops/flops.py`, or in NOTHING."""
    files = Path(ops.__file__).parent.rglob("*.py")
    names = {name for file in files for name in re.findall(r'@op\(\s*"(\w+)"', file.read_text()) if name != "twice"}
    assert names - NOTHING == set(FORWARD)


@pytest.mark.parametrize("pattern", ["M", "ME", "MF", "R"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_counts_what_counting_says(pattern, gradients):
    config = mm.ModelConfig(pattern, 2, 32, 64, experts=mm.ExpertsConfig(4))
    torch.manual_seed(0)
    model, tokens = mm.MoEMamba(config), torch.randint(64, (2, 16))
    with ops.backend("cpu"):
        model(tokens, targets=tokens).loss.backward()  # so that all ops are there
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            out = model(tokens, targets=tokens)
            if gradients:
                (out.loss + out.auxiliary).backward()
    # Vectors, which `counting` takes for parameters that a token passes through, make no products.
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("A_log"))
    expected = 32 * (flops_per_token(config, 16) - 2 * vectors) * (3 if gradients else 1)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # sums of the statistics are products too


def test_shapes_of_triton_ops():
    scan = formula("selective_scan_backward", ["dy", "dfinal_state", "u", "dt", "A"])
    assert scan((2, 3, 8), None, (2, 3, 8), (2, 3, 8), (8, 4)) == 2 * 9 * 48 * 4
    experts = formula("expert_feedforward", ["x", "indices", "gates", "up", "down", "activation"])
    assert experts((10, 8), (10, 2), (10, 2), (4, 12, 8), (4, 8, 6), "swiglu") == 2 * 20 * (12 * 8 + 8 * 6)
    assert formula("cpu_rms_norm", []) is None
