"""Every door that a family declares, against the family's reference: outputs, and gradients by name."""

import sys

import pytest
import samples
import torch
from torch import Tensor

from moemamba import ops
from moemamba.cli import doctor
from moemamba.ops.choice import BACKENDS, OPS, Backend, Door, compute, unsupported

TOLERANCE = 1e-3  # of an output's or a gradient's norm


def doors():
    return [(op, backend) for op in sorted(OPS) for backend in OPS[op].doors]


def device_for(op, backend):
    """Where a door can be tried; skips the test, and says why, where it cannot."""
    reason = "no device"
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        reason = ops.why_not(backend, device) or OPS[op].doors[backend].why_not(device)
        if reason is None:
            return device
    pytest.skip(reason)


def outputs_and_gradients(function, sample, differentiates):
    """By name: "0", "1", ... the outputs, "d x" the gradient of x, where there is one."""
    leaves = {
        name: value.clone().requires_grad_(
            differentiates and value.is_floating_point() and name not in samples.CONSTANT
        )
        if isinstance(value, Tensor)
        else value
        for name, value in sample.items()
    }
    with torch.set_grad_enabled(differentiates):
        result = function(*leaves.values())
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    found = {str(place): output.detach() for place, output in enumerate(outputs)}
    wanted = [output for output in outputs if output.requires_grad]
    if wanted:
        torch.manual_seed(1)
        sum((output.double() * torch.rand(output.shape).to(output)).sum() for output in wanted).backward()
        found |= {f"d {name}": x.grad for name, x in leaves.items() if isinstance(x, Tensor) and x.grad is not None}
    return found


def check(op, backend):
    """That a door computes what the reference does, on each of its family's samples."""
    device, differentiates = device_for(op, backend), OPS[op].doors[backend].holds != "no gradient"
    for sample in samples.of(op):
        here = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample.items()}
        expected = outputs_and_gradients(OPS[op].reference, here, differentiates)
        with ops.backend(backend):
            found = outputs_and_gradients(lambda *args: compute(op, *args), here, differentiates)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name].double() - value.double()).norm()
            assert found[name].shape == value.shape, name
            assert error <= TOLERANCE * value.double().norm() + 1e-6, f"{name} is {error:.1e} away"


@pytest.mark.filterwarnings("ignore:.* encountered")  # by the interpreter
@pytest.mark.parametrize(("op", "backend"), doors())
def test_a_door_is_the_reference(op, backend):
    check(op, backend)


@pytest.mark.parametrize("name", ["grouped_linear", "linear_float32", "places_in_queues", "route", "route_with_stats"])
def test_old_names_warn(name):
    assert name not in ops.__all__
    with pytest.warns(DeprecationWarning, match=f"moemamba.ops.{name} will be gone"):
        assert callable(getattr(ops, name))


def test_a_new_backend_is_a_file_a_line_and_a_door(tmp_path, monkeypatch, capsys):
    """It is offered by `doctor`, tested by what is generated above, and chosen where its line says so."""
    (tmp_path / "fake.py").write_text(
        "def rms_norm(x, weight, eps):\n"
        "    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()\n"
        "    return y if weight is None else y * weight\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def load():
        import fake

        return fake.rms_norm

    monkeypatch.setitem(BACKENDS, "fake", Backend(lambda device: None))
    monkeypatch.setitem(OPS["rms_norm"].doors, "fake", Door(load))
    x, weight = torch.randn(2, 3), torch.ones(3)
    used = ops.choose("rms_norm", x)
    assert used != "fake"
    assert ("rms_norm", "fake") in doors()
    assert "fake" not in sys.modules
    doctor.main([])
    assert f'{used} goes before it; ops.backend("fake") asks for it' in capsys.readouterr().out
    check("rms_norm", "fake")
    monkeypatch.setattr(sys.modules["fake"], "rms_norm", lambda x, weight, eps: x * weight)
    with pytest.raises(AssertionError, match="0 is"):
        check("rms_norm", "fake")
    monkeypatch.setitem(BACKENDS, "fake", Backend(lambda device: None, natural=("cpu",)))
    monkeypatch.setitem(OPS, "rms_norm", OPS["rms_norm"]._replace(doors={"fake": Door(load)}))
    assert ops.choose("rms_norm", x) == "fake"
    weighed = Door(load, supports=lambda x, weight=None, *rest: "it has weights" if weight is None else None)
    monkeypatch.setitem(OPS, "rms_norm", OPS["rms_norm"]._replace(doors={"fake": weighed}))
    assert ops.choose("rms_norm", x, weight) == "fake" and ops.choose("rms_norm", x, None) == "reference"
    assert unsupported(weighed, (x, None)) == "it has weights"
    assert ops.rms_norm(x, weight).equal(x)
