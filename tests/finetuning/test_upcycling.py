"""Dense models as mixtures of experts: the same function at first, and then all of it learns."""

import sys

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, TrainConfig, cli, load, save, train
from moemamba.config import AttentionConfig, FeedForwardConfig
from moemamba.finetuning.upcycling import upcycle
from moemamba.text import ByteTokenizer

TOKENS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


def dense(folder, pattern, **more):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, 2, 32, **{"attention": AttentionConfig(2), **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are not zero either
            parameter += 0.02 * torch.randn_like(parameter)
    save(folder, model, ByteTokenizer())
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


FORMS = {
    "identity": ("M", {}, {"n_experts": 4}),
    "identity, top 2": ("MA", {}, {"n_experts": 4, "top_k": 2, "d_expert": 24}),
    "copies": ("MF", {}, {"n_experts": 8}),
    "copies, top 2": ("MF", {}, {"n_experts": 8, "top_k": 2}),
    "virtual groups": ("MF", {"feedforward": FeedForwardConfig(48)}, {"n_experts": 8, "granularity": 4}),
    "virtual groups, two copies": (
        "MF",
        {"feedforward": FeedForwardConfig(48, "gelu", bias=True)},
        {"n_experts": 8, "granularity": 2, "top_k": 4},
    ),
    "in parallel, relu": ("(MF)A", {"feedforward": FeedForwardConfig(48, "relu", bias=True)}, {"n_experts": 3}),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_function_is_the_same(name, tmp_path):
    pattern, more, how = FORMS[name]
    model = dense(tmp_path / "dense", pattern, **more)
    found = upcycle(tmp_path / "dense", tmp_path / "sparse", **how)
    sparse, _ = load(tmp_path / "sparse")
    assert found.difference <= 1e-5 and found.spread > 0.1
    torch.testing.assert_close(logits(sparse), logits(model), rtol=0, atol=1e-5)
    if name.startswith("identity"):
        assert torch.equal(logits(sparse), logits(model))
    assert sparse.config.experts.n_experts == how["n_experts"]


def test_routers_away_from_zero_spread_the_tokens_and_choose_whole_copies(tmp_path):
    model = dense(tmp_path / "dense", "MF", feedforward=FeedForwardConfig(48))
    upcycle(tmp_path / "dense", tmp_path / "sparse", 8, granularity=2, router_std=0.01)
    sparse, record = load(tmp_path / "sparse")[0], []
    with torch.no_grad():
        found = sparse(TOKENS, record=record).logits
    torch.testing.assert_close(found, logits(model), rtol=0, atol=0.05)
    for choice in record:
        assert (choice.indices.sort(-1).values // 2).diff(dim=-1).abs().max() == 0  # both slices of one copy
        assert len(choice.indices.unique()) == 8


@pytest.mark.parametrize("pattern", ["M", "MF"])
def test_all_of_it_learns(pattern, tmp_path):
    """An expert that adds nothing yet is moved by the first step, and what is before it by the second."""
    model = dense(tmp_path / "dense", pattern)
    upcycle(tmp_path / "dense", tmp_path / "sparse", 4, router_std=0.01)
    (tmp_path / "text.txt").write_text("once upon a time there was\n\n" * 400)
    sparse, _ = load(tmp_path / "sparse")
    where = {"run": str(tmp_path / "run"), "start": str(tmp_path / "sparse"), "data": str(tmp_path / "text.txt")}
    size = {"steps": 6, "batch_size": 4, "context": 32, "learning_rate": 1e-2}
    after = train(TrainConfig(sparse.config, **where, **size)).model
    layer, before = after.layers[1].branches[0], sparse.layers[1].branches[0]
    for name, parameter in layer.named_parameters():
        moved = (parameter - dict(before.named_parameters())[name]).flatten(1).norm(dim=1)
        assert moved.min() > 0, name
    assert not torch.allclose(logits(after), logits(model), atol=1e-3)


@pytest.mark.parametrize(
    ("pattern", "how", "said"),
    [
        ("ME", {}, "has experts already"),
        ("MF", {"n_experts": 6, "granularity": 4}, "granularity is 4, which does not divide n_experts = 6"),
        ("MF", {"top_k": 3, "granularity": 2}, "does not divide top_k = 3"),
        ("MF", {"d_expert": 8}, "d_expert is of experts after Mamba layers"),
        ("M", {"granularity": 2}, "has no F to cut into slices"),
        ("(MA)", {}, "has neither F nor an M of its own"),
    ],
)
def test_what_cannot_be_is_said(pattern, how, said, tmp_path):
    dense(tmp_path / "dense", pattern)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        upcycle(tmp_path / "dense", tmp_path / "sparse", **how)
    assert not (tmp_path / "sparse").exists()


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    dense(tmp_path / "dense", "MF")
    monkeypatch.setattr(sys, "argv", ["moemamba", "upcycle", str(tmp_path / "dense"), "--experts", "4"])
    cli.main()
    said = capsys.readouterr().out
    assert "its logits differ by" in said and "dense-upcycled" in said
    assert load(tmp_path / "dense-upcycled")[0].config.pattern == "ME"
