"""Decoding from buffers, captured as a CUDA graph where there is a GPU: the tokens and states of the ordinary calls."""

import pytest
import torch
from torch import nn

from moemamba import ModelConfig, MoEMamba, generate, ops
from moemamba.config import AttentionConfig
from moemamba.inference import Sampling, captured, generation
from moemamba.inference import draws as draws_
from moemamba.inference.sampling import sample
from moemamba.inference.stopping import Ending, read_stops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[1, 2, 3], [9], [4, 4, 5, 6, 7, 8, 1]]
PATTERNS = pytest.mark.parametrize("pattern", ["M", "ME", "MF", "MAR", "AE", "(ME)"])


GREEDY = Sampling(temperature=0)


def build(pattern, **changes):
    torch.manual_seed(0)
    config = ModelConfig(pattern, 2, 32, vocab_size=29, attention=AttentionConfig(2)).replace(**changes)
    model = MoEMamba(config).to(DEVICE).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def endings(stop, prompts):
    stops = read_stops(stop, 29)
    return [Ending(stops) for _ in prompts]


def decoded(model, count=12, sampling=GREEDY, prompts=PROMPTS, stop=(), seed=None):
    """What `stream` yields on a GPU, row by row; without a GPU nothing is captured but all else is the same."""
    seeds = None if seed is None else [(seed, row) for row in range(len(prompts))]
    draws = None if seeds is None else draws_.Draws(seeds, list(map(len, prompts)), count, 29, DEVICE)
    with torch.inference_mode():
        hidden, state = generation._prefill(model, prompts, model.embedding.weight.device)
        steps = list(generation._captured(model, hidden, state, count, sampling, endings(stop, prompts), draws))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def ordinary(model, count=12, stop=()):
    """Greedy tokens by calls of the model that know nothing of decoders."""
    rows = []
    for prompt in PROMPTS:
        state, tokens, row = None, torch.tensor([prompt], device=DEVICE), []
        with torch.no_grad():
            for _ in range(count):
                output = model(tokens, state)
                tokens, state = output.logits[:, -1:].argmax(-1), output.state
                row.append(int(tokens))
                if row[-1] in stop:
                    row.pop()
                    break
        rows.append(row)
    return rows


@PATTERNS
def test_tokens_are_those_of_ordinary_calls(pattern):
    model = build(pattern)
    expected = ordinary(model)
    assert decoded(model) == expected
    assert decoded(model) == expected  # again, from the same buffers
    assert decoded(model, 5) == [row[:5] for row in expected]
    stop = expected[1][3]
    assert decoded(model, stop=[stop]) == ordinary(model, stop=[stop])


@PATTERNS
def test_state_is_that_of_ordinary_calls(pattern):
    model = build(pattern)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]], device=DEVICE)
    with torch.inference_mode():
        state = model(tokens).state
        with captured.claim(model, state, 4, greedy=True) as decoder:
            list(decoder.tokens(tokens[:, 0], 4, lambda *_: None))
            written = decoder.history[:4].T
        for step in range(3):
            state = model(written[:, step : step + 1], state).state
        for buffers, mixer in zip(decoder.state.mixers, state.mixers, strict=True):
            for buffer, tensor in zip(buffers, mixer, strict=True):
                if buffer.shape != tensor.shape:  # attention's, with room to spare
                    buffer = buffer[:, : tensor.shape[1]] if tensor.ndim == 2 else buffer[:, :, : tensor.shape[2]]
                torch.testing.assert_close(buffer, tensor, rtol=2e-4, atol=2e-5)


def test_sampling_repeats_with_a_seed():
    model = build("ME")
    runs = [decoded(model, 20, Sampling(top_k=9, top_p=0.9), seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("pattern", ["M", "MF"])
def test_kernels_of_a_whole_layer(pattern, norm):
    """The path of `ops.mamba_step`: in Triton's interpreter without a GPU."""
    pytest.importorskip("triton")
    model = build(pattern, norm=norm)
    with ops.backend("reference"):
        expected = ordinary(model, 4)
    with ops.backend("triton"):
        x = torch.zeros(3, 1, 32, device=DEVICE)
        with torch.inference_mode():
            assert model.layers[0].branches[0].weights_of_step(x) is not None
        assert decoded(model, 4) == expected


def test_layers_that_are_not_as_built_are_called():
    """A low-rank addition, a hook, gradients: then the children are called."""
    model = build("M")
    layer, x = model.layers[0].branches[0], torch.zeros(1, 1, 32, device=DEVICE)

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with ops.backend("triton" if DEVICE == "cpu" else None), torch.inference_mode():
        assert layer.weights_of_step(x) is not None
        hook = layer.x_proj.register_forward_hook(lambda *_: None)
        assert layer.weights_of_step(x) is None
        hook.remove()
        before, plain = decoded(model, 4), layer.out_proj
        layer.out_proj = Doubled(64, 32, bias=False, device=DEVICE)
        layer.out_proj.weight = plain.weight
        assert layer.weights_of_step(x) is None
    with ops.backend("reference"):
        assert decoded(model, 4) == ordinary(model, 4)
    assert before  # of the model as it was
    with torch.enable_grad():
        assert layer.weights_of_step(x) is None


def test_two_at_once_do_not_share_buffers():
    model = build("M")
    expected = ordinary(model)
    with torch.inference_mode():
        runs = []
        for _ in range(2):
            hidden, state = generation._prefill(model, PROMPTS, model.embedding.weight.device)
            runs.append(generation._captured(model, hidden, state, 12, GREEDY, endings((), PROMPTS), None))
        pairs = list(zip(*runs, strict=True))
    assert all(a == b for a, b in pairs) and [list(row) for row in zip(*(a for a, _ in pairs), strict=True)] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 20, 100])
@PATTERNS
def test_captured_equals_uncaptured(pattern, rows, dtype, monkeypatch):
    model = build(pattern, d_model=64).to(dtype)
    prompts = [[1 + row % 20, 2, 3] for row in range(rows)]
    results = []
    for capture in (True, False):
        captured._idle.clear()
        if not capture:
            monkeypatch.setattr(captured.Decoder, "capture", lambda self: None)
        results.append(decoded(model, 20, prompts=prompts))
        decoder = captured._idle[model]
        assert (decoder.graph is not None) == capture
        results[-1] = (results[-1], [tensor.clone() for mixer in decoder.state.mixers for tensor in mixer])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.gpu
def test_generate_uses_it_and_sees_new_weights():
    model = build("ME")
    first = generate(model, PROMPTS, 16, temperature=0)
    assert captured._idle[model].graph is not None and first == ordinary(model, 16)
    with torch.no_grad():
        for parameter in model.parameters():  # in place, and moved
            parameter.mul_(0.7)
        model.head.weight = nn.Parameter(model.head.weight.flip(0).contiguous(), requires_grad=False)
    assert generate(model, PROMPTS, 16, temperature=0) == ordinary(model, 16)
    seeded = [generate(model, PROMPTS, 16, temperature=0.9, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_logits_are_sampled_as_before():
    """Sampling outside the graph is `sample` on the model's logits."""
    model = build("M")
    with torch.inference_mode():
        output = model(torch.tensor([[3, 4]], device=DEVICE))
        with captured.claim(model, output.state, 4, greedy=False) as decoder:
            tokens = [
                row[0] for row in decoder.tokens(output.logits[:, -1].argmax(-1), 4, lambda x, _: sample(x, GREEDY))
            ]
    assert tokens == ordinary_from([3, 4], model, 4)


def ordinary_from(prompt, model, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens], device=DEVICE)).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
