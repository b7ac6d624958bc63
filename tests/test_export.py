"""torch.export: a model, and its state in and out, as a graph that computes the same."""

import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree

from moemamba import ModelConfig, MoEMamba, State
from moemamba.config import AttentionConfig


def build(pattern):
    torch.manual_seed(0)
    return MoEMamba(ModelConfig(pattern, 1, 32, vocab_size=29, attention=AttentionConfig(2))).eval()


@pytest.mark.parametrize("pattern", ["ME", "MF", "AE", "R", "(ME)"])
def test_a_model_and_its_state(pattern):
    model, tokens = build(pattern), torch.arange(16).view(2, 8)
    with torch.no_grad():
        expected = model(tokens)
        program = torch.export.export(model, (tokens,))
        found = program.module()(tokens)
        torch.testing.assert_close(found.logits, expected.logits)
        assert isinstance(found.state, State)
        step = torch.export.export(model, (tokens[:, :1], expected.state))
        torch.testing.assert_close(
            step.module()(tokens[:, :1], found.state).logits, model(tokens[:, :1], expected.state).logits
        )


def test_an_exported_model_is_saved_and_loaded_elsewhere(tmp_path):
    model, tokens, file = build("ME"), torch.arange(16).view(2, 8), tmp_path / "model.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (tokens,)), file)
        torch.save(model(tokens).logits, tmp_path / "logits.pt")
    program = f"""if True:
        import torch, moemamba.model
        moemamba.ops.load_kernels("cpu")
        found = torch.export.load({str(file)!r}).module()(torch.arange(16).view(2, 8))
        torch.testing.assert_close(found.logits, torch.load({str(tmp_path / "logits.pt")!r}))
        assert isinstance(found.state, moemamba.State)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_state_is_a_tree_of_its_tensors():
    state = build("MA")(torch.arange(8)[None]).state
    leaves, spec = _pytree.tree_flatten(state)
    assert len(leaves) == sum(len(mixer) for mixer in state.mixers)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert isinstance(_pytree.tree_unflatten(leaves, spec), State)
    assert _pytree.tree_map(torch.zeros_like, state).nbytes == state.nbytes
