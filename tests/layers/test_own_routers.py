"""Routers of one's own: what `route` makes of choices is what ours makes of them, and examples of others work."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import tokens_of
from torch import nn

import moemamba as mm
from moemamba import layers
from moemamba.layers import Choice, RouterStats, route

sys.path.insert(0, f"{Path(__file__).parents[2] / 'examples'}")
from routers import HashRouter, SigmoidRouter, with_router

SEQ_IDX = torch.tensor([[0] * 4 + [1] * 3, [0] * 5 + [-1] * 2, [0] * 7, [-1] * 7])


class Ours(layers.BaseRouter):
    """Softmax top-k, written as somebody else would."""

    def __init__(self, like: layers.Router):
        super().__init__(like.n_experts, like.top_k, like.capacity_factor)
        self.weight, self.groups = like.weight, like.groups

    def forward(self, x, seq_idx=None):
        logits = F.linear(x, self.weight)
        gates, indices = logits.softmax(-1).topk(self.top_k)
        return self.routed(indices, gates, seq_idx, logits=logits)


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize(("top_k", "groups"), [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_route_is_what_the_router_does(seq_idx, capacity, top_k, groups, training):
    torch.manual_seed(1)
    router = layers.Router(6, 5, top_k, capacity).double().train(training)
    router.groups = groups
    other, x = Ours(router).train(training), torch.randn(4, 7, 6, dtype=torch.float64)
    found = []
    for each in (router, other):
        routing = each(x, seq_idx)
        weights = torch.linspace(1, 2, routing.gates.numel()).view_as(routing.gates)
        (routing.stats.loss(1.0, 1.0) + (routing.gates * weights).sum()).backward()
        found.append((*routing[:2], *routing.stats, router.weight.grad.clone()))
        router.weight.grad = None
    names = ("indices", "gates", *RouterStats._fields, "gradient")
    for name, one, two in zip(names, *found, strict=True):
        torch.testing.assert_close(two, one, msg=lambda said, name=name: f"{name}: {said}")


def test_choices_are_replayed():
    torch.manual_seed(0)
    moe, x = layers.MoE(6, 5, top_k=2), torch.randn(3, 7, 6)
    seq_idx, record = SEQ_IDX[:3], []
    y, stats = moe(x, seq_idx, record)
    again, same = moe(x, seq_idx, routing=record[0])
    assert torch.equal(again, y) and torch.equal(same.load, stats.load)
    other = layers.MoE(6, 5, top_k=2)  # an oracle: somebody else's choices
    assert torch.equal(other(x, seq_idx, routing=record[0])[1].load, stats.load)
    given = route(*record[0], 5, seq_idx, capacity_factor=0.5)
    limited, stats = moe(x, seq_idx, routing=given)
    assert stats.dropped > 0 and not torch.equal(limited, y)
    assert stats.balance_loss == stats.z_loss == 0
    flat, stats = moe(x[0])
    torch.testing.assert_close(flat, moe(x[:1])[0][0])
    assert torch.equal(moe(x[0], routing=Choice(*(each[:1] for each in record[0])))[1].load.sum(), stats.load.sum())


@pytest.mark.parametrize("kind", ["sigmoid", "hash", "expert choice"])
def test_models_with_other_routers(kind, tmp_path):
    config = mm.ModelConfig("ME", 2, 16, 31, experts=mm.ExpertsConfig(4))
    torch.manual_seed(0)
    model = with_router(config, kind).eval()
    assert model.router_names == ("layers.1.branches.0", "layers.3.branches.0")
    tokens = tokens_of(2)
    out = model(tokens, targets=tokens)
    (out.loss + out.auxiliary).backward()
    seen = mm.look(model, tokens)
    assert len(seen.experts) == 2 and (out.router[0].load > 0).any()
    mm.save(tmp_path / "saved", model)
    loaded, _ = mm.load(tmp_path / "saved", into=with_router(config, kind))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    if kind != "expert choice":  # which looks at what is to come
        one_by_one, state = [], None
        for position in range(tokens.shape[1]):
            step = model(tokens[:, position : position + 1], state)
            state, one_by_one = step.state, [*one_by_one, step.logits]
        torch.testing.assert_close(torch.cat(one_by_one, 1), model(tokens).logits, rtol=1e-4, atol=1e-5)
        found = mm.generate(model, tokens[0].tolist(), 5, temperature=0)
        expected = tokens[:1]
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        assert found == expected[0, -5:].tolist()


def test_a_router_in_a_layer():
    moe = layers.MoE(6, 4, router=SigmoidRouter(6, 4))
    y, stats = moe(torch.randn(2, 5, 6))
    assert y.shape == (2, 5, 6) and stats.load.sum() == 20
    embedding = nn.Embedding(9, 6)
    hashed = layers.MoE(6, 4, router=HashRouter(embedding, 4))
    assert hashed(embedding(torch.tensor([[1, 1, 2]])))[1].load.max() >= 2


def test_training_with_another_router(tmp_path):
    from moemamba.host.progress import Report

    first = Path(__file__).parents[1] / "fixtures" / "v0.1" / "prepared"
    config = mm.TrainConfig(
        data=str(first), run=str(tmp_path / "run"), steps=4, batch_size=4, context=16, eval_tokens=64, accumulate=2
    )
    model = with_router(mm.ModelConfig("ME", 1, 8, experts=mm.ExpertsConfig(4)), "sigmoid")
    mm.train(config, model=model, report=Report(silent=True))
    balanced = with_router(mm.ModelConfig("ME", 1, 8, experts=mm.ExpertsConfig(4, bias_rate=0.1)), "sigmoid")
    with pytest.raises(ValueError, match=r"bias_rate is 0\.1, but the router of layers\.1\.branches\.0 has no bias"):
        mm.train(mm.TrainConfig(data=str(first), run=str(tmp_path / "b"), steps=4), model=balanced)


def test_what_route_refuses():
    indices, gates = torch.zeros(2, 3, 1, dtype=torch.int64), torch.ones(2, 3, 1)
    for options, said in (
        ({"logits": torch.zeros(2, 3, 5)}, r"logits has shape \(2, 3, 5\); expected \(2, 3, 4\)"),
        ({"seq_idx": torch.zeros(2, 2)}, r"seq_idx has shape \(2, 2\); expected \(2, 3\)"),
        ({"groups": 3}, "cannot be cut into 3 routing groups"),
    ):
        with pytest.raises(ValueError, match=said):
            route(indices, gates, 4, **options)
    with pytest.raises(ValueError, match="gates has shape"):
        route(indices, gates[..., 0], 4)


def test_choices_of_any_integers_and_of_tokens_in_no_order():
    moe, x, record = layers.MoE(16, 4, top_k=2), torch.randn(2, 5, 16), []
    y, _ = moe(x, record=record)
    for kind in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(moe(x, routing=Choice(record[0].indices.to(kind), record[0].gates))[0], y)
    flat, _ = moe(x.flatten(0, 1), routing=Choice(*(part.flatten(0, 1) for part in record[0])))
    assert torch.equal(flat.view_as(y), y)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (torch.full((2, 5, 1), 7), "indices has 7; experts are 0 to 3, and 4 stands for none"),
        (torch.full((2, 5, 1), -1), "indices has -1; experts are 0 to 3"),
        (torch.zeros(2, 5, 1), "indices is torch.float32; expected integers"),
        (
            torch.zeros(2, 4, 1).long(),
            r"choices of shape \(2, 4, 1\); expected \(b, l, k\) with \(b, l\) = \(2, 5\) as x",
        ),
    ],
)
def test_choices_of_no_expert_are_named(indices, said):
    with pytest.raises(ValueError, match=said):
        layers.MoE(16, 4)(torch.randn(2, 5, 16), routing=Choice(indices, torch.ones(indices.shape)))


def test_one_router_may_serve_several_layers(tmp_path):
    config = mm.ModelConfig("ME", 2, 16, 31, experts=mm.ExpertsConfig(4, bias_rate=0.1))
    model = mm.MoEMamba(config).eval()
    model.layers[3].branches[0].router = model.layers[1].branches[0].router
    assert model.router_names == ("layers.1.branches.0", "layers.3.branches.0")
    tokens = tokens_of(2)
    out = model(tokens, targets=tokens)
    model.update_balance_bias(out.router)
    mm.save(tmp_path / "shared", model)
    assert torch.equal(mm.load(tmp_path / "shared")[0](tokens).logits, model(tokens).logits)
