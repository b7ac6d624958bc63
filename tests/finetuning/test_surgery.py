"""Models made of models: each is what its definition says, and what must stay the same does."""

import pytest
import torch
from models import tokens_of

import moemamba as mm
from moemamba.finetuning.surgery import average, merge, prune, split

EXPERTS = mm.ExpertsConfig(4, n_shared_experts=1, activation="relu")
MODELS = {
    "E": mm.ModelConfig("ME", 2, 16, 31, experts=EXPERTS),
    "E biases": mm.ModelConfig("E", 1, 16, 31, experts=mm.ExpertsConfig(4, top_k=2, bias=True, router_bias=True)),
    "E sigmoid": mm.ModelConfig("E", 1, 16, 31, experts=mm.ExpertsConfig(4, scores="sigmoid")),
    "R": mm.ModelConfig("R", 2, 16, 31, routed=mm.RoutedMambaConfig(experts=mm.ExpertsConfig(4))),
    "R apart": mm.ModelConfig(
        "R", 1, 16, 31, routed=mm.RoutedMambaConfig(routing="independent", experts=mm.ExpertsConfig(4, d_expert=6))
    ),
    "tied": mm.ModelConfig("E", 1, 16, 31, experts=mm.ExpertsConfig(4), tie_embeddings=True),
}


def build(name):
    torch.manual_seed(0)
    model = mm.MoEMamba(MODELS[name]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    return model(tokens_of(2)).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("divide", [False, True])
def test_split_experts_compute_the_same(name, divide):
    model = build(name)
    if divide and name == "R":
        with pytest.raises(ValueError, match="no hidden width to divide"):
            split(model, 2, divide=True)
        return
    made = split(model, 2, divide=divide)
    assert {experts.n_experts for experts in made.config.routers} == {8} and made.training == model.training
    torch.testing.assert_close(logits(made), logits(model))
    assert not torch.allclose(logits(split(model, 2, top_k=1)), logits(model))
    if divide:
        assert sum(p.numel() for p in made.parameters()) < 1.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_pruning_leaves_what_is_kept(name):
    model, count = build(name), len(MODELS[name].routers)
    order = prune(model, [3, 2, 1, 0])
    torch.testing.assert_close(logits(order), logits(model))  # experts have no order
    few = prune(model, [[0, 2] if number % 2 else [1, 3] for number in range(count)])
    assert {experts.n_experts for experts in few.config.routers} == {2}
    place = few.router_names[0]
    old, new = (each.get_submodule(f"{place}.router").weight for each in (model, few))
    assert torch.equal(new, old[[1, 3]])
    # Where the router chooses among the kept ones alone, so does the pruned model choose.
    with torch.no_grad():
        for own in model.router_names:
            router = model.get_submodule(f"{own}.router")
            lost = [0, 2] if own == place else ([1, 3] if model.router_names.index(own) % 2 else [0, 2])
            router.balance_bias[lost] = -1e3
    seen, pruned = mm.look(model, tokens_of(1)), mm.look(few, tokens_of(1))
    assert torch.equal(torch.tensor([1, 3])[pruned.experts[place]], seen.experts[place])


def test_merging_is_the_mean():
    model = build("E")
    copies = merge(split(model, 2, top_k=1), [[0, 1], [2, 3], [4, 5], [6, 7]])
    torch.testing.assert_close(logits(copies), logits(model))
    merged = merge(model, [[0, 1, 2], [3]])
    old, new = (each.layers[1].branches[0].experts.up_proj for each in (model, merged))
    torch.testing.assert_close(new, torch.stack([old[:3].mean(0), old[3]]))


def test_averages():
    models = [mm.MoEMamba(MODELS["tied"]) for _ in range(3)]
    mean = average(models, [1, 2, 1])
    for name, value in mean.state_dict().items():
        parts = [model.state_dict()[name] for model in models]
        torch.testing.assert_close(value, (parts[0] + 2 * parts[1] + parts[2]) / 4)
    assert mean.head.weight is mean.embedding.weight
    assert torch.equal(logits(average(models[:1])), logits(models[0]))


def with_own_router():
    model = build("E")
    model.layers[0].branches[0].router = torch.nn.Identity()
    return model


def test_what_cannot_be_made(tmp_path):
    model = build("E")
    for call, said in (
        (lambda: prune(model, [0, 4]), "its experts are 0 to 3"),
        (lambda: prune(with_own_router(), [0, 1]), "layers.0.branches.0.router is .*Identity, of which nobody but you"),
        (lambda: prune(model, [[0]] * 3), "lists for 3 routers, and the model has 2"),
        (lambda: prune(model, [0, 0]), "name each expert once"),
        (lambda: prune(build("E biases"), [0]), "top_k is 2, more than n_experts = 1"),
        (lambda: merge(model, [[0], []]), "groups of one or more"),
        (lambda: split(model, 1), "2 or more"),
        (lambda: split(model, 5, divide=True), "does not divide the hidden width"),
        (lambda: split(mm.MoEMamba(mm.ModelConfig("M", 1, 8)), 2), "no experts"),
        (lambda: average([model, build("R")]), "several architectures"),
        (lambda: average([model], [0.0]), "whose sum is not 0"),
        (lambda: average([]), "models is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    mm.save(tmp_path / "split", split(model, 2).float())
    assert mm.load(tmp_path / "split")[0].config.experts.top_k == 2
