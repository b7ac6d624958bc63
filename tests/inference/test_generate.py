"""Generation: the same tokens as a full forward pass of everything so far, whatever the batch."""

import math

import numpy as np
import pytest
import torch

from moemamba import ModelConfig, MoEMamba, generate
from moemamba.config import AttentionConfig
from moemamba.inference import Sampling, engine, stream
from moemamba.inference.choosing import sample
from moemamba.inference.draws import Draws

PROMPTS = [[1, 2, 3], [9], [4, 4, 5, 6, 7, 8, 1]]


@pytest.fixture(scope="module", params=["ME", "MAR", "AE"])
def model(request):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(request.param, 2, 32, vocab_size=29, attention=AttentionConfig(2))).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def slow_greedy(model, prompt, count):
    tokens = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    model.train()
    return tokens[len(prompt) :]


def test_greedy_is_a_full_forward_for_each_token(model, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 4)  # so that a prompt takes several calls
    expected = [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, temperature=0) == expected
    assert [generate(model, prompt, 12, temperature=0) for prompt in PROMPTS] == expected
    assert generate(model, torch.tensor(PROMPTS[0]), 12, temperature=0) == expected[0]
    assert model.training  # left as it was


def test_a_row_stops_by_itself(model):
    free = generate(model, PROMPTS, 12, temperature=0)
    stop = free[1][3]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPTS, 12, temperature=0, stop=[stop]) == expected


def test_a_seed_repeats(model):
    first, again, other = (generate(model, PROMPTS, 20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_streaming_yields_each_token_as_it_comes(model):
    steps = stream(model, PROMPTS, 5, Sampling(temperature=0))
    assert [list(row) for row in zip(*steps, strict=True)] == generate(model, PROMPTS, 5, temperature=0)
    assert generate(model, PROMPTS[0], 0) == []


def test_the_callers_turn_is_the_callers(model):
    """Between two tokens of a stream its caller may train, or stream from the same model: modes are as they were."""
    model.layers[0].eval()  # a part that its owner keeps in evaluation
    modes = [module.training for module in model.modules()]
    steps = [stream(model, PROMPTS, 5, Sampling(temperature=0)) for _ in range(2)]
    rows = []
    for pair in zip(*steps, strict=True):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert [module.training for module in model.modules()] == modes
        rows.append(pair)
        if len(rows) == 3:
            break
    steps[0].close()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    rest = list(steps[1])
    model.train()
    expected = [list(row) for row in zip(*generate(model, PROMPTS, 5, temperature=0), strict=True)]
    assert [a for a, _ in rows] == expected[:3] and [b for _, b in rows] + rest == expected


def test_prompts_of_any_kind(model):
    expected = generate(model, PROMPTS, 4, temperature=0)
    arrays, tensors = [np.array(row) for row in PROMPTS], [torch.tensor(row) for row in PROMPTS]
    assert generate(model, arrays, 4, temperature=0) == generate(model, tensors, 4, temperature=0) == expected
    assert generate(model, arrays[0], 4, temperature=0) == expected[0]
    assert generate(model, list(tensors[0]), 4, temperature=0) == expected[0]
    assert generate(model, torch.zeros(0, 3, dtype=torch.int64), 4) == []


def draws(rows, vocabulary):
    return Draws([(0, row) for row in range(rows)], [0] * rows, 1, vocabulary, "cpu").at(0)


LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), 5),
        (Sampling(top_k=2), 2),
        (Sampling(top_k=99), 5),
        (Sampling(top_p=0.6), 2),
        (Sampling(top_p=0.5), 1),
        (Sampling(top_p=1.0), 5),
        (Sampling(min_p=0.2), 3),
        (Sampling(top_k=3, top_p=0.9), 3),
        (Sampling(temperature=0), 1),
    ],
)
def test_sampling_draws_from_what_is_left(sampling, kept):
    drawn = sample(LOGITS.expand(20_000, -1), sampling, draws(20_000, 5)).bincount(minlength=5) / 20_000
    expected = LOGITS.exp()[0] * (torch.arange(5) < kept)
    torch.testing.assert_close(drawn, expected / expected.sum(), atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1e-60, 1e-45, 1e-38, 1e-5])
def test_temperatures_near_zero_take_the_most_likely(temperature):
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert sample(logits, Sampling(temperature)).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 1e300, math.inf])
def test_temperatures_near_infinity_take_any_that_is_possible(temperature):
    logits = torch.tensor([[3.0, -torch.inf, -2.0]]).expand(200, -1)
    assert set(sample(logits, Sampling(temperature)).tolist()) == {0, 2}


def test_top_k_of_equals_is_k():
    drawn = sample(torch.zeros(1, 6).expand(2000, -1), Sampling(top_k=2))
    assert len(drawn.unique()) == 2


def test_temperature_sharpens_and_flattens():
    drawn = (
        sample(LOGITS.expand(20_000, -1), Sampling(temperature=2.0), draws(20_000, 5)).bincount(minlength=5) / 20_000
    )
    torch.testing.assert_close(drawn, (LOGITS[0] / 2).softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": []}, "prompt 0 has no tokens"),
        ({"prompts": [[1], [2, 29]]}, "prompt 1 has the token 29; this model's tokens are 0 to 28"),
        ({"prompts": [3, -1]}, "prompt 0 has the token -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = MoEMamba(ModelConfig("M", 1, 16, vocab_size=29))
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [1], **arguments})


@pytest.mark.parametrize("pattern", ["E", "F", "(EF)E"])
def test_a_model_that_remembers_nothing_generates(pattern):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, 2, 16, 31)).eval()
    prompts = [[3, 1, 4], [5]]
    for prompt, found in zip(prompts, generate(model, prompts, 5, temperature=0.0), strict=True):
        expected = list(prompt)
        for _ in found:
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert found == expected[len(prompt) :] and len(found) == 5
