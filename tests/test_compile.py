"""Layers compiled one by one: one function, few compilations, names unchanged."""

import copy

import pytest
import torch

from moemamba import ModelConfig, MoEMamba


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_are_the_same_function(recompute: bool) -> None:
    """Loss and every gradient; three blocks compile one graph more than one, since the first sub-layer has no sum to
    finish."""
    torch.manual_seed(0)
    plain = MoEMamba(ModelConfig("ME", 3, 32))
    compiled = copy.deepcopy(plain)
    plain.recompute = compiled.recompute = recompute
    tokens = torch.randint(0, 257, (2, 17))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers(backend="aot_eager", fullgraph=not recompute)
    for model in (plain, compiled):
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
    if not recompute:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert list(plain.state_dict()) == list(compiled.state_dict())
    gradients = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=lambda m, name=name: f"{name}: {m}")
