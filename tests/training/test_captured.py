"""Decoding from buffers, captured as a CUDA graph where there is a GPU: the tokens and states of the ordinary calls."""

import pytest
import torch
from torch import nn

from moemamba import ModelConfig, MoEMamba, generate, ops
from moemamba.config import AttentionConfig
from moemamba.inference import Engine, Request, Sampling, engine, generation, graph
from moemamba.inference.stopping import read_stops

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


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Without a GPU nothing is captured but all else is the same: rows of padding, and a step that is ahead."""
    monkeypatch.setattr(engine, "capturable", lambda model: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(graph, "EAGER", 1 << 30)


def decoded(model, count=12, sampling=GREEDY, prompts=PROMPTS, stop=(), seed=None, slots=None, decoder=None):
    """Each prompt's new tokens."""
    decoder = decoder or Engine(model, slots or len(prompts))
    requests = [
        Request(prompt, count, sampling, read_stops(stop, 29), None if seed is None else (seed, row))
        for row, prompt in enumerate(prompts)
    ]
    rows = {decoder.submit(request): [] for request in requests}
    while decoder.busy:
        for event in decoder.step():
            if event.token is not None:
                rows[event.request].append(event.token)
            if event.kept is not None:
                del rows[event.request][event.kept :]
    return list(rows.values())


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
    decoder = Engine(model, 3)
    assert decoded(model, decoder=decoder) == expected
    assert decoded(model, decoder=decoder) == expected  # again, from the same buffers
    assert decoded(model, 5) == [row[:5] for row in expected]
    stop = expected[1][3]
    assert decoded(model, stop=[stop]) == ordinary(model, stop=[stop])
    for slots in (1, 2):  # rows that come when others have left
        assert decoded(model, stop=[stop], slots=slots) == ordinary(model, stop=[stop])


@PATTERNS
def test_state_is_that_of_ordinary_calls(pattern):
    model = build(pattern)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]], device=DEVICE)
    decoder = Engine(model, 3)
    for row in tokens.tolist():
        decoder.submit(Request(row, 9, GREEDY))
    found = [decoder.step() for _ in range(5)]
    written = torch.tensor([[event.token for event in events] for events in found[1:]], device=DEVICE).T
    with torch.inference_mode():
        state = model(torch.cat([tokens, written], 1)).state
    for row in range(2):
        own = decoder._rows.take(row)
        for taken, mixer in zip(own.mixers, state.select([row]).mixers, strict=True):
            for tensor, expected in zip(taken, mixer, strict=True):
                torch.testing.assert_close(tensor, expected, rtol=2e-4, atol=2e-5)


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
    decoders = [Engine(model, 3) for _ in range(2)]
    rows = [{each.submit(Request(prompt, 12, GREEDY)): [] for prompt in PROMPTS} for each in decoders]
    while any(each.busy for each in decoders):
        for each, own in zip(decoders, rows, strict=True):
            for event in each.step():
                own[event.request].append(event.token)
    assert [list(own.values()) for own in rows] == [expected] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 20, 100])
@PATTERNS
def test_captured_equals_uncaptured(pattern, rows, dtype, monkeypatch):
    model = build(pattern, d_model=64).to(dtype)
    prompts = [[1 + row % 20, 2, 3] for row in range(rows)]
    results = []
    for capture in (True, False):
        if not capture:
            monkeypatch.setattr(graph, "EAGER", 1 << 30)
        decoder = Engine(model, rows)
        tokens = decoded(model, 20, prompts=prompts, decoder=decoder)
        assert bool(decoder._stepper.graphs) == capture
        results.append((tokens, [tensor.clone() for mixer in decoder._rows.mixers for tensor in mixer]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["ME", "AE"])
def test_rows_leave_and_come(pattern, monkeypatch):
    """From graph to graph, as others finish: the tokens of each prompt alone."""
    monkeypatch.setattr(graph, "FEWER", 9)
    model = build(pattern)
    decoder = Engine(model, 6)
    prompts = [[1 + row, 2, 3][: 1 + row % 3] for row in range(12)]
    counts = [10 + 17 * row % 50 for row in range(12)]
    rows = {decoder.submit(Request(*each, GREEDY)): [] for each in zip(prompts, counts, strict=True)}
    while decoder.busy:
        for event in decoder.step():
            rows[event.request].append(event.token)
    assert {key for key, _ in decoder._stepper.graphs} >= {4, 6}
    alone = [decoded(model, count, prompts=[prompt])[0] for prompt, count in zip(prompts, counts, strict=True)]
    assert list(rows.values()) == alone


@pytest.mark.gpu
def test_generate_uses_it_and_sees_new_weights():
    model = build("ME")
    first = generate(model, PROMPTS, 16, temperature=0)
    ((_, kept),) = generation._kept.idle
    assert kept._stepper.graphs and first == ordinary(model, 16)
    with torch.no_grad():
        for parameter in model.parameters():  # in place, and moved
            parameter.mul_(0.7)
        model.head.weight = nn.Parameter(model.head.weight.flip(0).contiguous(), requires_grad=False)
    assert generate(model, PROMPTS, 16, temperature=0) == ordinary(model, 16)
    seeded = [generate(model, PROMPTS, 16, temperature=0.9, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_greedy_rows_beside_others():
    """Each row has its own way to choose, and its own randomness: the tokens that it has alone."""
    model = build("M")
    kinds = [(GREEDY, None), (Sampling(top_k=5), (3, 0)), (GREEDY, (1, 0)), (Sampling(), (3, 1)), (Sampling(), (4, 0))]
    requests = [Request([3, 4 + row], 12 + row, kind, seed=seed) for row, (kind, seed) in enumerate(kinds)]

    def tokens(*several):
        decoder = Engine(model, 4)
        rows = {decoder.submit(request): [] for request in several}
        while decoder.busy:
            for event in decoder.step():
                rows[event.request].append(event.token)
        return list(rows.values())

    alone = [tokens(request)[0] for request in requests]
    assert tokens(*requests) == alone and tokens(*requests[::-1]) == alone[::-1]
