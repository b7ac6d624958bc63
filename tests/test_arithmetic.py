"""Law 9: on a CPU and without gradients a token's bits depend neither on its batch, nor on how its prompt was cut, nor
on the path. Everything here is compared bit for bit."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS

from moemamba import ModelConfig, MoEMamba, State, ops
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, RoutedMambaConfig
from moemamba.counting import state_bytes
from moemamba.inference import Engine, Request, Sampling
from moemamba.layers.quantised import quantise

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)
EXPERTS = ExpertsConfig(5, d_expert=40, top_k=2, n_shared_experts=1)
SMALL = {
    **{
        name: replace(config, d_model=48, vocab_size=37, attention=replace(config.attention, n_heads=4))
        for name, config in MODELS.items()
    },
    "M odd": ModelConfig("M", d_model=41, vocab_size=31).replace(d_state=5, d_conv=3, expand=1.5),
    "M layernorm": ModelConfig("M", d_model=48, vocab_size=31, norm="layernorm", final_norm=False),
    "E gelu": ModelConfig("E", d_model=40, vocab_size=37, experts=EXPERTS).replace(activation="gelu"),
    "E gelu_erf": ModelConfig("E", d_model=40, vocab_size=37, experts=EXPERTS).replace(
        activation="gelu_erf", bias=True
    ),
    "F geglu": ModelConfig("F", d_model=40, vocab_size=37, feedforward=FeedForwardConfig(57, activation="geglu")),
    "F silu": ModelConfig("F", d_model=40, vocab_size=37, feedforward=FeedForwardConfig(57, activation="silu")),
    "(MAE)F": ModelConfig("(MAE)F", d_model=48, vocab_size=37, attention=AttentionConfig(2), experts=EXPERTS),
}
INT8 = " in 8 bits"
SMALL |= {f"{name}{INT8}": SMALL[name] for name in ("(MAE)F", "M odd", "R", "E gelu_erf")}
LARGE = {
    f"{pattern} {d_model}": ModelConfig(
        pattern,
        1,
        d_model,
        vocab_size=257 if d_model == 256 else 50_257,
        experts=ExpertsConfig(8, d_expert=512 if d_model == 256 else 1536, top_k=1 + (d_model == 512)),
        routed=RoutedMambaConfig(experts=ExpertsConfig(4, top_k=2)),
        feedforward=FeedForwardConfig(682),
    )
    for pattern in ("ME", "AF", "R", "(ME)")
    for d_model in (256, 512)
}
LARGE |= {f"{name}{INT8}": LARGE[name] for name in ("ME 256", "(ME) 512")}
MIXING = [name for name, config in SMALL.items() if state_bytes(config, 1)]
BATCHES = (1, 2, 3, 4, 5, 7, 64)
CUTS = (1, 2, 3, 63, 64, 65, 2049)


@cache
def build(name):
    torch.manual_seed(11)
    model = MoEMamba({**SMALL, **LARGE}[name].replace(n_blocks=min(2, {**SMALL, **LARGE}[name].n_blocks))).eval()
    with torch.no_grad():  # away from the special values of the initialisation
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    if name.endswith(INT8):
        quantise(model)
    return model.requires_grad_(False)


def tokens_of(name, rows, length, seed=0):
    vocabulary = build(name).config.vocab_size
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def alone(name, tokens):
    """Logits of rows read one by one, each by a single call."""
    return torch.cat([build(name)(row[None]).logits for row in tokens])


def in_pieces(name, tokens, sizes, state=None):
    """Logits of tokens read in pieces, the last size over and over."""
    outputs, start, sizes = [], 0, list(sizes)
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        out = build(name)(tokens[:, start : start + size], state)
        state, start = out.state, start + size
        outputs.append(out.logits)
    return torch.cat(outputs, dim=1), state


def same(found, expected):
    """Every bit, also those of what is not a number."""
    assert found.shape == expected.shape
    different = found.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} numbers, the first at {different.nonzero()[0]}"
    )


@pytest.fixture(autouse=True)
def on_the_cpu_without_gradients():
    with torch.inference_mode(), ops.backend("cpu"):
        yield


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Where two threads are asked for, everything is worth them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    if request.param > 1:
        for module in [
            m for name, m in sys.modules.items() if name.startswith("moemamba.ops") and "WORTH_THREADS" in vars(m)
        ]:
            monkeypatch.setattr(module, "WORTH_THREADS", 1)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALL)
def test_any_batch(name, threads):
    tokens = tokens_of(name, 7, 9)
    expected = alone(name, tokens)
    for rows in (2, 3, 4, 5, 7):
        same(build(name)(tokens[:rows]).logits, expected[:rows])
        same(in_pieces(name, tokens[:rows], [1])[0], expected[:rows])


@pytest.mark.parametrize("name", SMALL)
def test_any_cut(name):
    @SETTINGS
    @given(st.integers(1, 90), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 9))
    def check(length, sizes, seed):
        tokens = tokens_of(name, 1, length, seed)
        same(in_pieces(name, tokens, sizes)[0], alone(name, tokens))

    check()


@pytest.mark.parametrize("name", SMALL)
def test_padded_and_packed(name, threads):
    """Left-padded rows of a batch, and sequences one after the other in a row."""
    tokens, lengths = tokens_of(name, 5, 23), (23, 4, 11, 1, 22)
    seq_idx = torch.tensor([[-1] * (23 - length) + [0] * length for length in lengths])
    turned = torch.stack([torch.cat([row[length:], row[:length]]) for row, length in zip(tokens, lengths, strict=True)])
    out = build(name)(turned, seq_idx=seq_idx)
    packed = (
        build(name)(
            torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])[None],
            seq_idx=torch.arange(5).repeat_interleave(torch.tensor(lengths))[None],
        )
        .logits[0]
        .split(lengths)
    )
    after = build(name)(tokens[:, :2], out.state).logits
    for row, length in enumerate(lengths):
        expected = alone(name, torch.cat([tokens[row, :length], tokens[row, :2]])[None])[0]
        same(out.logits[row, 23 - length :], expected[:length])
        same(packed[row], expected[:length])
        same(after[row], expected[length:])


@pytest.mark.parametrize("name", SMALL)
def test_saved_selected_and_forked(name, tmp_path):
    tokens = tokens_of(name, 3, 20)
    expected = alone(name, tokens)
    state = build(name)(tokens[:, :13]).state
    state.save(tmp_path / "state")
    for resumed, rows in ((State.load(tmp_path / "state"), [0, 1, 2]), (state.select([2, 0]), [2, 0])):
        same(in_pieces(name, tokens[rows, 13:], [1, 3], resumed)[0], expected[rows, 13:])
    forked = state.select(slice(1, 2)).fork(4)
    same(in_pieces(name, tokens[1:2, 13:].expand(4, -1), [2], forked)[0], expected[[1] * 4, 13:])


def through_engine(name, prompts, count, slots, chunk):
    """Tokens of each prompt, and the logits that the last was chosen from."""
    engine, found = Engine(build(name), slots, chunk), {}
    numbers = [engine.submit(Request(prompt, count, Sampling(temperature=0))) for prompt in prompts]
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.request, []).append(event.token)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("name", MIXING)
def test_through_the_engine(name, threads):
    """Requests that come and go in each other's company: the states that are left behind, and the tokens."""
    prompts = [tokens_of(name, 1, length, length)[0].tolist() for length in (1, 3, 17, 8, 30)]
    expected = [through_engine(name, [prompt], 6, 1, None)[0] for prompt in prompts]
    for slots, chunk in ((5, None), (3, 4), (4, 1)):
        assert through_engine(name, prompts, 6, slots, chunk) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        logits = build(name)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", MIXING)
def test_slots_hold_the_same_states(name):
    """A step in the engine's buffers, in place, leaves what a call leaves."""
    engine = Engine(build(name), 3)
    tokens = tokens_of(name, 3, 62)  # so that a block of keys ends on the way
    for row in tokens:
        engine.submit(Request(row.tolist(), 9, Sampling(temperature=0)))
    written = [[] for _ in range(3)]
    for _ in range(5):
        for event in engine.step():
            written[event.request].append(event.token)
    for row in range(3):
        read = torch.tensor([tokens[row].tolist() + written[row][:-1]])
        expected, found = build(name)(read).state, engine._rows.take(row)
        for ours, theirs in zip(found.mixers, expected.mixers, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)


def digest(name, length):
    """Of all that a call returns."""
    tokens = tokens_of(name, 2, length)
    with torch.inference_mode(), ops.backend("cpu"):
        out = build(name)(tokens)
    sums = hashlib.sha256(out.logits.numpy().tobytes())
    for mixer in out.state.mixers:
        for tensor in mixer:
            sums.update(tensor.contiguous().numpy().tobytes())
    return sums.hexdigest()


def test_another_process():
    names = list(SMALL)
    program = f"import test_arithmetic as t\nfor name in {names!r}: print(t.digest(name, 40))"
    here = Path(__file__).parent
    path = os.pathsep.join([f"{here}", f"{here / 'tools'}", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest(name, 40) for name in names]


def test_gradients_are_torchs():
    """Training's products stay what they were."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        x, weight = torch.randn(5, 70), torch.randn(90, 70, requires_grad=True)
        assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_real_sizes_in_any_batch(name, threads):
    tokens = tokens_of(name, 64, 5)
    expected = alone(name, tokens)
    for rows in BATCHES:
        same(build(name)(tokens[:rows]).logits, expected[:rows])
        same(in_pieces(name, tokens[:rows], [2, 1])[0], expected[:rows])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_real_sizes_with_any_cut(name, threads):
    length = 2051 if build(name).config.vocab_size < 1000 else 300
    tokens = tokens_of(name, 1, length)
    expected = alone(name, tokens)
    for cut in CUTS:
        part = tokens[:, :70] if cut < 10 else tokens
        same(in_pieces(name, part, [cut])[0], expected[:, : part.shape[1]])
    same(in_pieces(name, tokens, [length - 1, 1])[0], expected)
