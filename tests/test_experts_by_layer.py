"""Experts per layer may differ: what is counted is what is built, kept, trained, generated from and operated upon."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moemamba as mm
from moemamba import ExpertsConfig, ModelConfig, MoEMamba, count_parameters
from moemamba.config import RoutedMambaConfig
from moemamba.counting import memory, sublayers
from moemamba.distributed.sharding import fill
from moemamba.finetuning import surgery
from moemamba.finetuning.upcycling import upcycle, upcycled_config
from moemamba.initialisation import draw
from moemamba.integrations.portability import obstacles
from moemamba.reading import from_dict, to_dict

PATTERNS = ("ME", "E", "(ME)F", "EE", "ER", "(EER)A", "R")


@st.composite
def configurations(draw_):
    """Models whose layers have experts of numbers of their own, in E, in R, or in both."""
    pattern, n_blocks = draw_(st.sampled_from(PATTERNS)), draw_(st.integers(1, 3))

    def numbers(letter):
        layers = pattern.count(letter) * n_blocks
        several = st.lists(st.integers(1, 6), min_size=layers, max_size=layers).map(tuple)
        return draw_(st.one_of(several, st.integers(1, 6))) if layers else 8

    def options(letter):
        n_experts = numbers(letter)
        fewest = n_experts if isinstance(n_experts, int) else min(n_experts)
        return ExpertsConfig(n_experts, draw_(st.integers(1, fewest)), n_shared_experts=draw_(st.integers(0, 1)))

    experts, inside = options("E"), options("R")
    routing = draw_(st.sampled_from(("shared", "independent")))
    if routing == "shared":
        inside = replace(inside, n_shared_experts=0)
    routed = RoutedMambaConfig(draw_(st.sampled_from((("out",), ("conv", "gate")))), routing, inside)
    attention = mm.config.AttentionConfig(2)
    return ModelConfig(pattern, n_blocks, 16, 31, experts=experts, routed=routed, attention=attention)


@settings(max_examples=40, deadline=None)
@given(configurations())
def test_counted_as_built(config):
    with torch.device("meta"):
        model = MoEMamba(config)
    count = count_parameters(config)
    assert count.total + count.embedding == sum(p.numel() for p in model.parameters())
    assert memory(config).weights == 4 * (count.total + count.embedding)
    routers = [model.get_submodule(place) for place in model.router_names]
    own = [getattr(each, "router", each).n_experts for each in routers]
    assert [each.n_experts for each in config.routers] == own
    assert sum(each.times for each in sublayers(config)) == len(model.layers)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert hash(config) == hash(from_dict(ModelConfig, to_dict(config)))


@settings(max_examples=8, deadline=None)
@given(configurations())
def test_kept_and_drawn(tmp_path_factory, config):
    torch.manual_seed(0)
    model = MoEMamba(config).eval()
    place = tmp_path_factory.mktemp("saved") / "model"
    mm.save(place, model)
    loaded, _ = mm.load(place)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
        assert loaded.config == config and torch.equal(loaded(tokens).logits, expected)
    with torch.device("meta"):
        drawn = MoEMamba(config)
    drawn.to_empty(device="cpu")
    draw(drawn, fill, 0)
    assert all(torch.equal(drawn.state_dict()[name], value) for name, value in model.state_dict().items())
    assert mm.generate(model, [3, 1, 4], 4, temperature=0.0) == mm.generate(loaded, [3, 1, 4], 4, temperature=0.0)


def test_one_number_is_written_as_ever():
    assert '"n_experts": 8,' in json.dumps(to_dict(ModelConfig("ME")))
    assert json.loads(json.dumps(to_dict(ModelConfig("E", 2, experts=ExpertsConfig((2, 4))))))["experts"][
        "n_experts"
    ] == [2, 4]


def test_replacing_knows_pattern_and_blocks():
    config = ModelConfig("ME", n_blocks=4).replace(n_experts=[4, 8, 8, 2])
    assert config.experts.n_experts == (4, 8, 8, 2)
    assert config.replace(n_blocks=2, n_experts=(4, 8)).experts.n_experts == (4, 8)
    assert config.replace(pattern="EM", top_k=2).experts.top_k == 2
    assert config.replace(n_experts=8) == ModelConfig("ME", n_blocks=4)
    assert mm.preset("moe-mamba-tiny", n_experts=(2, 4) * 2, n_blocks=4).uneven
    both = ModelConfig("ER", n_blocks=2).replace(n_experts=(2, 4))
    assert both.experts.n_experts == both.routed.experts.n_experts == (2, 4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: ModelConfig("MEE", 2).replace(n_experts=(2, 4, 8)),
            r"experts.n_experts has 3 numbers, and the model 4 layers E \(pattern 'MEE', n_blocks 2\); give one number "
            "for all, or 4",
        ),
        (lambda: ModelConfig("ME", 2).replace(n_experts=(2, 4)).replace(n_blocks=3), "has 2 numbers, and the model 3"),
        (
            lambda: ModelConfig("R", 2, routed=RoutedMambaConfig(experts=ExpertsConfig((2,)))),
            "routed.experts.n_experts has 1 numbers, and the model 2 layers R",
        ),
        (lambda: ExpertsConfig(()), "n_experts is empty; give one number or more"),
        (lambda: ExpertsConfig((4, 0)), r"n_experts is \(4, 0\); it must be greater than 0"),
        (lambda: ExpertsConfig((4, 2.5)), r"n_experts\[1\] is 2.5; expected a whole number"),
        (lambda: ExpertsConfig((4, 2), top_k=3), "top_k is 3, more than n_experts = 2"),
        (lambda: ModelConfig("M", 2).replace(n_experts=(2, 4)), "no letter of the pattern 'M' uses it"),
    ],
)
def test_wrong_numbers_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_trained_and_resumed_by_numbers(tmp_path):
    config = mm.TrainConfig(
        model=ModelConfig("ME", 2, 16, experts=ExpertsConfig((2, 5), capacity_factor=1.25, bias_rate=0.01)),
        data=str(text_of(tmp_path)),
        run=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        context=16,
        eval_every=2,
        save_every=2,
    )
    quiet = mm.Report(silent=True)
    whole = mm.train(config, report=quiet)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["model"]["experts"]["n_experts"] == [2, 5]
    parts = replace(config, run=str(tmp_path / "parts"))
    mm.train(parts, stop=2, report=quiet)
    again = mm.train(parts, resume=True, report=quiet)
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert [stats.load.numel() for stats in whole.model(torch.zeros(1, 4, dtype=torch.int64)).router] == [2, 5]


def text_of(folder):
    file = folder / "text.txt"
    file.write_text("\n\n".join(f"sentence {n} of a text, {n * n} words long" for n in range(200)))
    return file


def test_surgery_changes_each_layer():
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig("ME(ER)", 1, 16, 31, experts=ExpertsConfig(4), routed=RoutedMambaConfig(("out",))))
    keep = [[0, 3], [1, 2, 3], [5]]
    small = surgery.prune(model, keep)
    assert small.config.experts.n_experts == (2, 3) and small.config.routed.experts.n_experts == 1
    for place, own in zip(model.router_names, keep, strict=True):
        before, after = model.get_submodule(place).router.weight, small.get_submodule(place).router.weight
        assert torch.equal(before[own], after)
    back = surgery.prune(small, [[1], [0], [0]])
    assert back.config.experts.n_experts == 1
    wide = surgery.split(small.eval(), 2)
    assert wide.config.experts.n_experts == (4, 6) and wide.config.routed.experts.n_experts == 2
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(wide(tokens).logits, small(tokens).logits)
    together = ModelConfig("R", 1, 16, 31, routed=RoutedMambaConfig(("conv", "out"), "independent"))
    with pytest.raises(ValueError, match="the routers of one layer R would have"):
        surgery.prune(MoEMamba(together), [[0], [1, 2]])


def test_upcycled_by_layer(tmp_path):
    dense = MoEMamba(ModelConfig("MF", 2, 16, 31)).eval()
    mm.save(tmp_path / "dense", dense)
    found = upcycle(tmp_path / "dense", tmp_path / "sparse", n_experts=(2, 6), top_k=2)
    assert found.config.experts.n_experts == (2, 6) and found.difference < 1e-4
    with pytest.raises(ValueError, match="which does not divide n_experts = 3"):
        upcycled_config(dense.config, (2, 3), None, 2, None)
    with pytest.raises(ValueError, match="has 3 numbers, and the model 2 layers E"):
        upcycled_config(dense.config, (2, 3, 4), None, 1, None)


def test_formats_say_that_they_cannot():
    config = ModelConfig("ME", 2, 32, experts=ExpertsConfig((2, 4)))
    reasons = obstacles(config)
    assert "it has as many experts in each layer" in reasons["jamba"] and not reasons["hf"]
    assert all(
        one.total < two.total for one, two in pairwise([each for each in sublayers(config) if "E" in each.letters])
    )
