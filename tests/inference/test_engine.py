"""The engine: requests come and go at any time, and each gets the tokens that it gets alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ModelConfig, MoEMamba, generate, ops
from moemamba.config import AttentionConfig
from moemamba.inference import Engine, Request, Sampling, engine, prepared
from moemamba.inference.prefill import alike
from moemamba.inference.prepared import _Beside
from moemamba.inference.scheduler import Part
from moemamba.inference.slots import Slots
from moemamba.layers import Attention, RoutedMamba

GREEDY = Sampling(temperature=0)


def build(pattern):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, 1, 32, vocab_size=29, attention=AttentionConfig(2))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


MODELS = {pattern: build(pattern) for pattern in ("ME", "AR")}
PROMPTS = [[1 + k, 2, 3 * k % 29, 4, 5, 6 + k, 7][: 1 + 3 * k % 7] for k in range(6)]
ALONE = {
    name: [generate(model, prompt, 9, seed=[k]) for k, prompt in enumerate(PROMPTS)] for name, model in MODELS.items()
}


@pytest.mark.parametrize("pattern", MODELS)
def test_each_gets_what_it_gets_alone(pattern):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, 4),
        st.integers(1, 9),
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=7),
        st.sets(st.integers(0, 6)),
    )
    def check(slots, chunk, requests, aborted):
        decoder = Engine(MODELS[pattern], slots, chunk)
        tokens, kept = {}, {}

        def step():
            for event in decoder.step():
                tokens[event.request].append(event.token)
                if event.kept is not None:
                    kept[event.request] = event.kept

        for which, count, steps in requests:
            number = decoder.submit(Request(PROMPTS[which], count, seed=(which, 0)))
            tokens[number] = []
            for _ in range(steps):
                step()
            if number in aborted:
                decoder.abort(number)
        while decoder.busy:
            step()
        for number, (which, count, _) in enumerate(requests):
            assert tokens[number] == ALONE[pattern][which][: len(tokens[number])]
            if number not in aborted:
                assert kept[number] == len(tokens[number]) == count
        assert decoder._scheduler.free == slots and decoder._rows.live == 0

    check()


def test_a_long_prompt_lets_the_others_go_on():
    decoder = Engine(MODELS["ME"], 2, chunk=4)
    first = decoder.submit(Request([1, 2], 30, GREEDY))
    decoder.step()
    second = decoder.submit(Request([3] * 40, 2, GREEDY))
    steps = [[event.request for event in decoder.step()] for _ in range(10)]
    assert steps[:9] == [[first]] * 9 and steps[9] == [first, second]


def test_an_engine_goes_on_after_an_error():
    model = build("ME")
    decoder, prompt = Engine(model, 2), [1, 2, 3]
    weight = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    decoder.submit(Request(prompt, 5, GREEDY))
    (event,) = decoder.step()
    assert "not finite" in event.failure and event.kept == 0 and not decoder.busy
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, prompt, 5)
    with torch.no_grad():
        model.norm.weight.copy_(weight)
    decoder.submit(Request(prompt, 5, GREEDY))
    found = []
    while decoder.busy:
        found += [event.token for event in decoder.step()]
    assert found == generate(model, prompt, 5, temperature=0)


def test_where_answers_may_depend_on_others():
    def refused(model):
        with pytest.raises(ValueError, match="batch_invariant does not hold here") as found:
            Engine(model, 2, batch_invariant=True)
        return str(found.value)

    fine = copy.deepcopy(MODELS["ME"])
    engine = Engine(fine, 2, batch_invariant=True)
    assert "is bfloat16" in refused(copy.deepcopy(fine).to(torch.bfloat16))
    assert "on meta" in refused(MoEMamba(fine.config).to("meta"))
    with ops.backend("reference"):
        assert "another backend is asked for" in refused(fine)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in refused(fine)
    fine.layers[0].norm.register_forward_hook(lambda *_: None)
    assert "layers.0.norm has a forward hook" in refused(fine)
    other = copy.deepcopy(MODELS["ME"])
    other.layers[0].branches[0].out_proj = torch.nn.Linear(*other.layers[0].branches[0].out_proj.weight.T.shape)
    assert "out_proj is torch.nn.modules.linear.Linear" in refused(other)
    Engine(MoEMamba(fine.config.replace(n_shared_experts=1)), 2, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant does not hold here"):
        engine.renew(fine)


@pytest.mark.parametrize("pattern", ["ME", "AR", "M(FE)", "(MA)E", "ME hooked"])
def test_prompts_are_read_with_the_rows_that_decode(pattern, monkeypatch):
    """The same bits as apart: tokens, scores, routing, states and load, of several prompts with padding."""
    model, found = build(pattern.removesuffix(" hooked")), []
    if "hooked" in pattern:  # so that it may look at whole sequences
        model.layers[1].branches[0].router.register_forward_hook(lambda *_: None)
    read = _Beside.read
    monkeypatch.setattr(_Beside, "read", lambda self, *given: found.append(self.group) or read(self, *given))

    def answers():
        made = Engine(model, 5, chunk=12)
        events = {made.submit(Request([3, 1], 30, GREEDY)): []}
        for k, prompt in enumerate(PROMPTS):
            if k % 3 == 0:
                made.step()
            asked = {"prompt_logprobs": 2, "routing": True} if k % 2 else {}
            events[made.submit(Request(prompt * (1 + k), 5, seed=(k, 0), logprobs=1, keep=True, **asked))] = []
        while made.busy:
            for event in made.step():
                events[event.request].append(event)
        return list(events.values()), made.load

    together, load = answers()
    assert any(group.seq_idx is not None for group in found) and any(group.state is not None for group in found)
    found.clear()
    monkeypatch.setattr(prepared, "TOGETHER", 0)
    apart, expected = answers()
    assert not found
    for one, other in zip(together, apart, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a._replace(reading=None) == b._replace(reading=None)
            assert (a.reading is None) == (b.reading is None)
            if a.reading is not None:
                same(a.reading, b.reading)
    assert all(torch.equal(a, b) for a, b in zip(load, expected, strict=True)) and len(load) == len(expected)


def same(a, b):
    """Two readings, bit for bit."""
    assert a[:2] == b[:2] and (a.routing is None) == (b.routing is None)
    for one, other in zip(a.routing or (), b.routing or (), strict=True):
        assert all((mine == theirs).all() for mine, theirs in zip(one, other, strict=True))
    assert torch.equal(a.snapshot.hidden, b.snapshot.hidden)
    for one, other in zip(a.snapshot.state.mixers, b.snapshot.state.mixers, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_a_renewed_engine_has_the_weights_as_they_are():
    """Also those that were written to past autograd, of which no version tells."""
    model = copy.deepcopy(MODELS["ME"])
    decoder = Engine(model, 1)

    def hidden():
        decoder.submit(Request([3, 1], 3, GREEDY))
        while decoder.busy:
            decoder.step()
        return decoder._stepper._prepared.hidden[0].clone()

    before, mamba = hidden(), model.layers[0].branches[0]
    for weight in (mamba.A_log, mamba.conv1d.weight):
        weight.data.mul_(-2)
    decoder.renew(model)
    found = hidden()
    decoder = Engine(model, 1)
    assert torch.equal(found, hidden()) and not torch.equal(found, before)


def test_what_is_refused():
    decoder = Engine(MODELS["ME"], 2)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        decoder.submit(Request([1], -1))
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        decoder.submit(Request([], 3))
    decoder.submit(Request([1], 3))
    with pytest.raises(RuntimeError, match="requests under way"):
        decoder.renew(MODELS["ME"])


def test_parts_that_are_read_together():
    def lengths(*wanted):
        groups = alike([Part(k, 9 * k, 9 * k + length, True) for k, length in enumerate(wanted)])
        return [[part.last - part.first for part in group] for group in groups]

    assert lengths(5, 900, 700) == [[900, 700], [5]], "not mostly padding"
    assert lengths(5, 90, 7) == [[90, 7, 5]], "a little does not matter"


@torch.no_grad()
def test_what_has_left_is_never_read():
    model = MODELS["AR"]
    slots = Slots([Attention, RoutedMamba], 4, "cpu")
    states = [model(torch.tensor([prompt])).state for prompt in PROMPTS[:4]]
    for row, state in enumerate(states):
        slots.put(state, torch.tensor([row]))
    assert slots.drop([0, 2]) == [(0, 3)] and slots.live == 2
    for mixer in slots.mixers:
        for tensor in mixer:
            tensor[2:] = torch.nan if tensor.is_floating_point() else 99
    slots.put(states[0], torch.tensor([7]))
    assert slots.tokens[:3].tolist() == [3, 1, 7]
    for row, state in enumerate((states[3], states[1], states[0])):
        for taken, mixer in zip(slots.take(row).mixers, state.mixers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(taken, mixer, strict=True))
    assert all(tensor[:3].isfinite().all() for mixer in slots.mixers for tensor in mixer)
    assert slots.drop([0, 1, 2]) == [] and slots.live == 0


def test_prompts_in_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 2)
    for pattern, model in MODELS.items():
        assert generate(model, PROMPTS, 9, seed=list(range(6))) == ALONE[pattern]
